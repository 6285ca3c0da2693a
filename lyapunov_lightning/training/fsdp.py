"""Models that ``fully_shard`` (FSDP2) has sharded over the ranks: all that the package knows of FSDP is here.

``fully_shard`` changes three things about a module: its parameters become DTensors, its class becomes a subclass made
for it, and hooks gather the parameters before its forward pass and drop them afterwards. On a replica all three are
undone, with whole parameters of its own, so that it is measured like any other module. All that is asked of FSDP on the
module in training is to drop the parameters that it has gathered.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lyapunov_lightning.curvature.sharded.collectives import Collectives
from lyapunov_lightning.curvature.sharded.sharding import ShardedSpace, Sharding
from lyapunov_lightning.curvature.vectors.layout import FlatLayout, local_of
from lyapunov_lightning.curvature.vectors.ranks import Ranks
from lyapunov_lightning.curvature.vectors.space import VectorSpace

# ``register_forward_hook`` keeps a hook, by its id, in one of the first of these, and its options in the others.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors is sharded over ranks."""
    return any(local_of(tensor) is not tensor for tensor in tensors)


def num_parts(parameters: Sequence[Tensor]) -> int:
    """The number of parts into which the parameters are cut; 1 if each rank has all of them."""
    return next((int(p.device_mesh.size(-1)) for p in map(_untyped, parameters) if local_of(p) is not p), 1)


def reason_against(pl_module: nn.Module) -> str | None:
    """Why a sharded module cannot be measured, with the remedy; None if it can, or is not sharded."""
    parameters = dict(pl_module.named_parameters())
    if not is_sharded(list(parameters.values())):
        return None
    in_parts = [p for p in parameters.values() if local_of(p) is not p]
    managed = {parameter for layer in layers_of(pl_module) for parameter in layer}
    try:
        Sharding(in_parts)
        otherwise = "" if managed.issuperset(in_parts) else "Some parameters are spread by something else"
    except ValueError as error:
        otherwise = str(error).rstrip(".")
    if otherwise:
        return (
            f"{otherwise} than `fully_shard` over the ranks, such as tensor parallelism, of which PyTorch does not"
            " compute second derivatives rightly. Train with data parallelism alone (`tensor_parallel_size=1`), or"
            " measure a checkpoint with `lyapunov_lightning.measure`"
        )
    whole = [name for name, p in parameters.items() if p.requires_grad and local_of(p) is p]
    if whole:
        return (
            f"{', '.join(whole[:3])} {'is' if len(whole) == 1 else 'are'} not sharded, and so not averaged over the"
            " ranks. Call `fully_shard` on the whole module too, after its parts"
        )
    # The ranks of the mesh gather what is on their own devices only.
    offloaded = [p for p in in_parts if local_of(p).device.type != _untyped(p).device_mesh.device_type]
    if offloaded:
        return (
            "its shards are kept in the CPU's memory (`CPUOffloadPolicy`), where the ranks cannot gather them. Train"
            " without that policy"
        )
    return None


def put_away(pl_module: nn.Module) -> None:
    """Drop the parameters that FSDP has gathered for a forward pass, so that each module's parameters are its shards.

    After a forward pass without a backward pass, as in validation, the outermost module still has them gathered.
    """
    for module in _sharded_modules(pl_module):
        module.reshard()


def whole_parameters(pl_module: nn.Module, ranks: Ranks) -> dict[Tensor, Tensor]:
    """The whole of every sharded parameter, gathered by all ranks together.

    There is one collective for the trained parameters and one for the frozen ones, whose dtype may be another one.
    """
    found: dict[Tensor, Tensor] = {}
    sharded = [p for p in pl_module.parameters() if local_of(p) is not p]
    for is_trained in (True, False):
        parameters = [p for p in sharded if p.requires_grad is is_trained]
        if parameters:
            sharding = Sharding(parameters)
            space = ShardedSpace(sharding, ranks)
            with torch.no_grad():
                whole = space.whole(FlatLayout(parameters).flatten(parameters))
            found.update(zip(parameters, sharding.tensors_of(whole), strict=True))
    return found


def space_of_parameters(parameters: Sequence[Tensor], ranks: Ranks) -> VectorSpace:
    """The space of the vectors that parameters form, sharded or not."""
    if is_sharded(parameters):
        return ShardedSpace(Sharding(parameters), ranks)
    return FlatLayout(parameters).space(ranks)


def unsharded(twin: nn.Module, original: nn.Module) -> None:
    """Undo on a copy of a module what ``fully_shard`` did to the original, except for its parameters."""
    kind = _fsdp_module()
    if kind is None or not isinstance(original, kind):
        return
    state = _untyped(original)._get_fsdp_state()
    own = {
        single.id
        for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle)
        for single in getattr(handle, "handles", (handle,))
    }
    attributes = vars(twin)
    # FSDP's hooks would look for a state of the copy, and gather the parameters of the module in training. The user's
    # own hooks stay.
    for name in _HOOKS:
        hooks = attributes[name]
        attributes[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in own)
    # `register_fsdp_forward_method` shadows a method on the instance with one that gathers around it.
    for name, value in list(attributes.items()):
        function = getattr(value, "__func__", None)
        if getattr(function, "__globals__", {}).get("__name__") == kind.__module__:
            del attributes[name]
    for name, done in attributes.items():
        if name.startswith("__composable_api"):  # where PyTorch notes what was done to a module, and with which state
            # With its entry there, `shard_again` would be refused: PyTorch applies `fully_shard` to a module once.
            for key in [key for key, entry in done.items() if entry is state or key == "fully_shard"]:
                del done[key]
    twin.__class__ = type(original).__mro__[_mro_index(kind)]


def layers_of(pl_module: nn.Module) -> list[list[Tensor]]:
    """The groups of parameters that ``fully_shard`` gathers together, trained and frozen ones separate."""
    layers: list[list[Tensor]] = []
    taken: set[Tensor] = set()
    # Inner modules first: ``fully_shard`` leaves to an outer one only the parameters that no inner one has.
    for module in reversed(list(_sharded_modules(pl_module))):
        own = [p for p in module.parameters() if local_of(p) is not p and p not in taken]
        taken.update(own)
        layers += [
            layer for is_trained in (True, False) if (layer := [p for p in own if p.requires_grad is is_trained])
        ]
    return layers


def shard_again(original: nn.Module, twin: nn.Module, memo: Any, collectives: Collectives) -> dict[Tensor, Tensor]:
    """Shard a whole copy of a module as ``fully_shard`` has sharded the original, in full precision.

    Args:
        original: The module.
        twin: The copy, whose parameters have no memory (they are on the device ``"meta"``).
        memo: Knows what of the copy stands for what of the module.
        collectives: Gets every gather and scatter of the copy, before it is entered.

    Returns:
        The copy's parameter for each sharded parameter of the original. Its shards are still to be filled in.

    """
    from torch.distributed.fsdp import fully_shard

    names = {name: p for name, p in original.named_parameters() if local_of(p) is not p}
    dims = {id(memo.copy_of(p)): _untyped(p).placements[-1] for p in names.values()}
    groups: dict[int, tuple[Any, list[nn.Module]]] = {}
    for module in _sharded_modules(original):
        state = module._get_fsdp_state()
        groups.setdefault(id(state), (state, []))[1].append(memo.copy_of(module))
    # Inner modules first, as ``fully_shard`` requires.
    for state, modules in reversed(groups.values()):
        group = next(iter(_param_groups(state)), None)
        if group is not None:
            mesh = group.fsdp_params[0].sharded_param.device_mesh
            fully_shard(modules, mesh=mesh, shard_placement_fn=lambda parameter: dims[id(parameter)])
            for own in _param_groups(_untyped(modules[0])._get_fsdp_state()):
                own._all_gather_comm = _Noted(own._all_gather_comm, collectives)
                own._reduce_scatter_comm = _Noted(own._reduce_scatter_comm, collectives)
    device = next(iter(map(local_of, names.values()))).device
    twin._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    parameters = dict(twin.named_parameters())
    return {parameter: parameters[name] for name, parameter in names.items()}


class _Noted:
    """A gather or a scatter of FSDP, which `Collectives` gets to know before it is entered."""

    def __init__(self, collective: Any, collectives: Collectives) -> None:
        self._collective = collective
        self._collectives = collectives

    def allocate(self, *arguments: Any, **options: Any) -> Tensor:
        found: Tensor = self._collective.allocate(*arguments, **options)
        return found

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, *rest: Any, **options: Any) -> Any:
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (output_tensor, input_tensor)]

        def take_part() -> None:
            out, given = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes)
            self._collective(out, given, group, *rest, **{**options, "async_op": False})

        self._collectives.note(take_part)
        return self._collective(output_tensor, input_tensor, group, *rest, **options)


def discard(twin: nn.Module) -> None:
    """Free the memory of a copy that was sharded again.

    Its states, groups and parameters refer to each other in cycles, and would otherwise stay until Python collects
    garbage: one copy of the model for each evaluation.
    """
    for state in {id(state): state for state in (m._get_fsdp_state() for m in _sharded_modules(twin))}.values():
        for group in _param_groups(state):
            for parameter in group.fsdp_params:
                vars(parameter).clear()
            vars(group).clear()
        vars(state).clear()


def _param_groups(state: Any) -> Sequence[Any]:
    """The groups of parameters that a sharded module gathers together."""
    # PyTorch has a list of groups in newer versions, and one group or none in older ones.
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _sharded_modules(pl_module: nn.Module) -> Iterator[Any]:
    kind = _fsdp_module()
    return iter(()) if kind is None else (module for module in pl_module.modules() if isinstance(module, kind))


def _mro_index(kind: Any) -> int:
    """Where the class that the user wrote stands in the method resolution order of the class made of it."""
    return int(getattr(kind, "_orig_cls_mro_index", 2))


def _fsdp_module() -> Any:
    """The class of sharded modules; None as long as nobody has imported FSDP, since there are none then."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _untyped(value: Any) -> Any:
    """The same object for a type checker that does not know the attributes of DTensors and FSDP modules."""
    return value
