"""What the package takes for granted of PyTorch, private names among it.

What PyTorch cannot differentiate twice, and how that is repaired, is tested in ``test_operations.py`` and
``test_checkpointing.py`` of ``tests/curvature/compat``; here are the names and habits on which repairs and replicas
rest. When a new version breaks one of these, the message says which part of the package depends on it.
"""

import copyreg
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from tests.contracts.live import needed_by

COMPAT = needed_by("curvature/torch_compat")
MEAN_LOSS = needed_by("curvature/mean_loss")
REPLAY = needed_by("training/replica/replica")
COPYING = needed_by("training/replica/rules")
STABILITY = needed_by("curvature/stability/optimizers")


def shallow(value: Any) -> Any:
    copied = object.__new__(type(value))
    vars(copied).update(vars(value))
    return copied


class Seen(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


# What is patched while a loss is evaluated.


def test_hooks_on_saved_tensors_are_entered_by_a_method_of_their_class(monkeypatch):
    entered, enter = [], saved_tensors_hooks.__enter__

    def noticed(self: Any) -> Any:
        entered.append(self)
        return enter(self)

    monkeypatch.setattr(saved_tensors_hooks, "__enter__", noticed)
    x = torch.ones(2, requires_grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        x.exp()
    assert len(entered) == 1, COMPAT + "a loss that is evaluated again while it is differentiated is told by it"
    checkpoint.checkpoint(torch.exp, x, use_reentrant=False)
    assert len(entered) == 2, COMPAT + "checkpointing without reentry is told by it"


def test_reentrant_checkpointing_is_one_function(monkeypatch):
    calls = []
    monkeypatch.setattr(checkpoint.CheckpointFunction, "apply", lambda *args: calls.append(args))
    x = torch.ones(2, requires_grad=True)
    checkpoint.checkpoint(torch.add, x, x, use_reentrant=True)
    [(function, preserves, *arguments)] = calls
    message = COMPAT + "it is replaced by checkpointing without reentry"
    assert (function, preserves) == (torch.add, True), message
    assert all(argument is x for argument in arguments), message
    names = inspect.signature(checkpoint.checkpoint).parameters
    assert {"use_reentrant", "preserve_rng_state", "determinism_check"} <= names.keys(), message


@pytest.mark.parametrize("name", ["_CachingTorchDispatchMode", "_CachedTorchDispatchMode"])
def test_selective_checkpointing_keeps_results_in_these_modes(name):
    mode = getattr(checkpoint, name)
    parameters = [*inspect.signature(mode.__torch_dispatch__).parameters]
    assert parameters == ["self", "func", "types", "args", "kwargs"], COMPAT + "they are made to keep nothing"


def test_derivatives_can_be_had_from_the_engine_itself():
    x = torch.ones(2, requires_grad=True)
    y = (x**3).sum()
    with Seen() as seen:
        (gradient,) = torch.autograd.Variable._execution_engine.run_backward(
            (y,), (torch.ones_like(y),), True, True, (x,), allow_unreachable=True, accumulate_grad=False
        )
    message = COMPAT + "layers that are evaluated again see the modes of the loss"
    assert torch.equal(gradient, torch.full((2,), 3.0)), message
    assert gradient.requires_grad, message
    assert torch.autograd.grad not in seen.functions, message
    assert x.grad is None, message


def test_hooks_on_the_gradient_of_a_parameter_are_in_a_dictionary():
    x, called = torch.ones(2, requires_grad=True), []
    assert not x._backward_hooks, COMPAT + "most parameters have none"
    x.register_hook(called.append)
    hooks = dict(x._backward_hooks)
    x._backward_hooks.clear()
    (x**2).sum().backward()
    assert not called, COMPAT + "the user's hooks do not see a measurement"
    x._backward_hooks.update(hooks)
    (x**2).sum().backward()
    assert len(called) == 1, COMPAT + "and the training as before"


# What is read off a graph.


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_graph_tells_its_functions_leaves_and_what_they_keep():
    x = torch.ones(2, requires_grad=True)
    node = Cube.apply(x).grad_fn
    assert node._forward_cls.backward.__code__ is once_differentiable(lambda ctx: None).__code__, (
        COMPAT + "functions that are differentiable once are told by their code"
    )
    assert all(map(torch.equal, node.saved_tensors, (x,))), COMPAT + "the memory of a graph is counted by these"
    [(leaf, _)] = node.next_functions
    assert leaf.variable is x, MEAN_LOSS + "a loss that depends on the parameters themselves is refused"
    assert "_saved_result" in dir(x.exp().grad_fn), COMPAT + "the memory of a graph is counted by these"
    with torch.autograd.forward_ad.dual_level():
        assert not x._is_zerotensor(), COMPAT + "zeros of forward derivatives have no memory"


def test_autograd_grad_neither_accumulates_nor_calls_accumulation_hooks():
    x, called = torch.ones(2, requires_grad=True), []
    x.register_post_accumulate_grad_hook(called.append)
    torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert x.grad is None, MEAN_LOSS + "`.grad` is the optimizer's"
    assert not called, MEAN_LOSS + "the hooks by which DDP reduces gradients must not fire"


def test_attention_of_plain_mathematics_is_differentiable_twice():
    q = torch.randn(1, 1, 4, 2, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), q)
    assert second.isfinite().all(), COMPAT + "fused attention is switched off for the forward pass only"


def test_writing_to_a_tensor_counts_its_version():
    x = torch.ones(2)
    before = x._version
    x.add_(1)
    assert x._version > before, needed_by("curvature/products") + "kept graphs are dropped when parameters change"


def test_nodes_are_numbered_in_the_order_in_which_they_are_made():
    message = needed_by("curvature/sources") + "what was there before a loss is told from what the loss has made"
    x = torch.ones(2, requires_grad=True)
    before = x.exp()
    start = torch._C._autograd._get_sequence_nr()
    after, custom = x.exp(), Cube.apply(x)
    assert before.grad_fn._sequence_nr() < start <= after.grad_fn._sequence_nr() < custom.grad_fn._sequence_nr(), (
        message
    )


def test_calls_of_layers_go_through_one_method(monkeypatch):
    called, call = [], nn.Module._call_impl
    monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *args: called.append(self) or call(self, *args))
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model(torch.ones(1, 2))
    assert called == [model, *model], needed_by("curvature/sources") + "layers are watched for train and eval mode"


def test_transforms_wrap_tensors_that_can_be_unwrapped():
    x, seen = torch.ones(3), []

    def function(y: Tensor) -> Tensor:
        while torch._C._functorch.is_functorch_wrapped_tensor(y):
            y = torch._C._functorch.get_unwrapped(y)
        seen.append(y)
        return y.sum()

    torch.func.vmap(torch.func.grad(lambda y: (function(y), y.sum())[1]))(x[:, None])
    assert seen[0].data_ptr() == x.data_ptr(), needed_by("curvature/sources") + "what a loss is computed from"


def test_hooks_of_custom_functions_see_both_sides_of_their_backward_pass():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    x, seen = torch.ones(2, requires_grad=True), []
    y = Double.apply(x)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append((inputs[0], outputs[0])))
    torch.autograd.grad(y.sum(), x, create_graph=True)
    assert [float(side[0]) for side in seen[0]] == [2.0, 1.0], COMPAT + "backward passes that cut the graph are refused"


def test_writes_that_are_not_counted():
    message = needed_by("curvature/loss/freshness") + "contents are read, since versions do not tell of all writes"
    x, statistics = torch.ones(2), torch.zeros(2)
    x.data.mul_(2)
    x.numpy()[0] = 5
    nn.functional.batch_norm(torch.randn(4, 2), statistics, torch.ones(2), training=True)
    assert x._version == 0, message
    assert statistics.any(), message
    with torch.inference_mode():
        inferred = torch.ones(2)
    assert inferred.is_inference(), message


def test_attention_has_a_fast_path_that_can_be_switched_off():
    message = COMPAT + "values are those of the loss that is differentiated"
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not before)
    assert torch.backends.mha.get_fastpath_enabled() is not before, message
    torch.backends.mha.set_fastpath_enabled(before)


def test_accelerators_have_modules_of_their_name():
    message = needed_by("curvature/randomness") + "the states of their generators are kept"
    for kind in ("cuda", "xpu", "mps"):
        module = getattr(torch, kind)
        for name in ("get_rng_state", "set_rng_state", "device_count"):
            assert callable(getattr(module, name)), message
    assert torch._C._get_privateuse1_backend_name() == "privateuseone", message


# What a mode sees.


def test_looks_at_gradients_are_shown_to_modes():
    x = torch.ones(2, requires_grad=True)
    grad: Any = vars(torch._C.TensorBase)["grad"]
    message = REPLAY + "a step that looks at the gradients of the last step gets copies of them"
    with Seen() as seen:
        x.grad  # noqa: B018
        x.grad = None
        (x**2).sum().backward()
    assert {grad.__get__, grad.__set__, Tensor.backward} <= set(seen.functions), message
    with Seen() as seen:
        torch.autograd.backward((x**2).sum())
    assert torch.autograd.backward in seen.functions, message
    with Seen() as seen, torch._C.DisableTorchFunction():
        x.grad  # noqa: B018
    assert not seen.functions, MEAN_LOSS + "its own look at gradients is none of the loss's"


def test_layers_call_the_functions_that_are_replaced():
    layers = [
        (nn.Conv1d(1, 1, 1), torch.ones(1, 1, 2), torch.conv1d),
        (nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2), torch.conv2d),
        (nn.Conv3d(1, 1, 1), torch.ones(1, 1, 2, 2, 2), torch.conv3d),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), torch.ones(1, 2), torch._weight_norm),
        (lambda x: nn.MSELoss()(x, x), torch.ones(2), nn.functional.mse_loss),
    ]
    for layer, inputs, function in layers:
        with Seen() as seen:
            layer(inputs)
        assert function in seen.functions, COMPAT + f"{function.__name__} is computed from its parts"


# What a copy is made of.


def test_a_module_is_its_attributes():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not copyreg._slotnames(nn.Module), COPYING + "modules are copied by their attributes"
    twin = shallow(module)
    x = torch.randn(3, 2)
    assert torch.equal(twin(x), module(x)), COPYING + "and are then as good as new"
    assert twin.training is module.training
    vars(twin)["training"] = False
    assert not twin.training, REPLAY + "`mode='eval'` is an attribute of each module"
    assert module.training


def test_recurrent_layers_compute_with_the_parameters_of_a_list():
    layer = nn.LSTM(2, 3)
    assert all(a is b for a, b in zip(layer._flat_weights, layer.parameters(), strict=True)), (
        COPYING + "the list of the copy holds the copies of the parameters"
    )
    twin = shallow(layer)
    twin._flat_weights = [torch.zeros_like(weight) for weight in layer._flat_weights]
    assert not twin(torch.ones(1, 2))[0].any(), COPYING + "and it is these that the copy computes with"


def test_hooks_of_a_module_on_its_gradients_are_attributes():
    layer, called = nn.Linear(2, 2), []
    layer.register_full_backward_hook(lambda *_: called.append("hook"))
    layer.register_full_backward_pre_hook(lambda *_: called.append("pre-hook"))
    assert layer._backward_hooks, REPLAY + "they cannot be differentiated twice"
    assert layer._backward_pre_hooks, REPLAY + "they cannot be differentiated twice"
    vars(layer).update(_backward_hooks={}, _backward_pre_hooks={})
    layer(torch.ones(1, 2)).sum().backward()
    assert not called, REPLAY + "so a replica has none"


def test_views_of_one_memory_are_told_by_its_storage():
    x = torch.arange(6.0)
    assert x[2:4].untyped_storage()._cdata == x.untyped_storage()._cdata, COPYING + "copies share what originals share"
    storage = x.untyped_storage().clone()
    view = torch.empty(0).set_(storage, 2, (2,), (1,))
    assert torch.equal(view, x[2:4]), COPYING + "a copy is a view of a copied storage"
    parameter = Tensor._make_subclass(nn.Parameter, view, True)
    assert isinstance(parameter, nn.Parameter), COPYING + "the copy of a parameter is one"
    assert parameter.is_leaf, COPYING + "the copy of a parameter is one"
    assert parameter.requires_grad, COPYING + "the copy of a parameter is one"


def test_generators_copy_themselves_with_their_state():
    generator = torch.Generator().manual_seed(3)
    copied = generator.clone_state()
    assert torch.equal(torch.rand(2, generator=copied), torch.rand(2, generator=generator)), (
        COPYING + "a step may draw from a generator of its own"
    )


def test_an_optimizer_is_its_attributes():
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    assert {"param_groups", "state", "defaults"} <= vars(shallow(optimizer)).keys(), (
        needed_by("training/replica/rules", "training/replica/trainer_view")
        + "optimizers are copied by their attributes"
    )


def test_scripted_modules_copy_themselves():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.script(nn.Linear(2, 2))
    with torch.no_grad():
        copied = module.__deepcopy__({})
    names = [name for name, _ in module.named_parameters()]
    assert names == [name for name, _ in copied.named_parameters()], COPYING + "their parameters come in one order"
    assert copied.weight.data_ptr() != module.weight.data_ptr(), COPYING + "a replay has parameters of its own"


# Compiled code.


def test_compiled_functions_hold_what_they_were_compiled_from():
    def function(x: Tensor) -> Tensor:
        return x + 1

    compiled = torch.compile(function, backend="eager")
    assert vars(compiled)["_torchdynamo_orig_callable"] is function, COPYING + "a replay runs the original"


def test_compiled_code_can_be_run_eagerly_for_a_while():
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    layer = torch.compile(nn.Linear(2, 2), backend=backend)
    layer(torch.ones(1, 2))
    before = len(calls)
    with torch.compiler.set_stance("force_eager"):
        layer(torch.ones(1, 2))
    assert len(calls) == before == 1, COMPAT + "compiled code has one derivative only"
    layer(torch.ones(1, 2))
    assert len(calls) == 2, COMPAT + "and the training goes on with it afterwards"


# Optimizers.


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (torch.optim.Adam, {}, {"exp_avg_sq", "step"}),
        (torch.optim.Adam, {"amsgrad": True}, {"exp_avg_sq", "max_exp_avg_sq", "step"}),
        (torch.optim.AdamW, {}, {"exp_avg_sq", "step"}),
        (torch.optim.RMSprop, {}, {"square_avg"}),
        (torch.optim.RMSprop, {"centered": True}, {"square_avg", "grad_avg"}),
    ],
)
def test_second_moments_are_found_in_the_state_of_the_optimizer(kind, settings, names):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1, **settings)
    parameter.grad = torch.tensor([1.0, 2.0])
    optimizer.step()
    assert names <= optimizer.state[parameter].keys(), STABILITY + "the preconditioner is read from them"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (torch.optim.SGD, {"lr", "momentum", "nesterov", "dampening", "weight_decay", "maximize"}),
        (torch.optim.Adam, {"lr", "betas", "eps", "amsgrad", "maximize"}),
        (torch.optim.AdamW, {"lr", "betas", "eps", "amsgrad", "maximize"}),
        (torch.optim.RMSprop, {"lr", "momentum", "eps", "centered", "maximize"}),
    ],
)
def test_parameter_groups_hold_what_decides_on_stability(kind, names):
    message = needed_by("curvature/stability/optimizers", "training/optimizers", "training/updates") + "they read it"
    assert names <= kind([nn.Parameter(torch.ones(2))], lr=0.1).param_groups[0].keys(), message


def test_coupled_and_decoupled_decay_are_told_apart():
    message = needed_by("training/updates") + "coupled decay belongs to the objective"
    assert issubclass(torch.optim.AdamW, torch.optim.Adam), message
    group = torch.optim.Adam([nn.Parameter(torch.ones(2))], decoupled_weight_decay=True).param_groups[0]
    assert group["decoupled_weight_decay"], message


def test_what_is_hooked_to_a_step_comes_after_it():
    parameter, seen = nn.Parameter(torch.ones(2)), []
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(float(parameter.detach()[0])))
    optimizer.step()
    message = needed_by("callbacks/quasi_newton_lr_controller") + "it makes the step longer or shorter there"
    assert seen == [pytest.approx(0.9)], message
    handle.remove()
    optimizer.step()
    assert len(seen) == 1, message
