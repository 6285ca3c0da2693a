"""What training steps do beside computing a loss: draw, log, differentiate, write to parameters, use the trainer."""

from tests.generator.ingredients import State, tags
from tests.generator.state import _scaled

_STEPS_OWN_START = tags("on_train_batch_start")

GENERATORS = [
    State("torch's global generator", "loss = loss * (1 + 0.5 * torch.rand(()))"),
    State("NumPy's global generator", "loss = loss * float(np.random.uniform(0.5, 1.5))"),
    State("Python's global generator", "loss = loss * random.uniform(0.5, 1.5)"),
    State(
        "torch.Generator attribute",
        "loss = loss * (1 + 0.5 * torch.rand((), generator=self.$))",
        "self.$ = torch.Generator().manual_seed(3)",
    ),
    State(
        "numpy.random.Generator attribute",
        "loss = loss * self.$.uniform(0.5, 1.5)",
        "self.$ = np.random.default_rng(3)",
    ),
    State("RandomState in a list", "loss = loss * self.$[0].uniform(0.5, 1.5)", "self.$ = [np.random.RandomState(3)]"),
    State("random.Random attribute", "loss = loss * self.$.uniform(0.5, 1.5)", "self.$ = random.Random(3)"),
    State("dropout in a list", _scaled("self.$[0](x).square().mean()"), "self.$ = [nn.Dropout(0.5)]"),
    State(
        "distribution with rsample",
        "loss = loss + 0.1 * (out * torch.distributions.Normal(0.0, self.$.exp()).rsample(out.shape)).mean()",
        "self.$ = nn.Parameter(torch.zeros(()))",
    ),
]

ITERATORS = [
    State("range iterator", _scaled("next(self.$)"), "self.$ = iter(range(1000))"),
    State("list iterator", _scaled("next(self.$)"), "self.$ = iter([i % 5 for i in range(1000)])"),
    State("zip of iterators", _scaled("sum(next(self.$))"), "self.$ = zip(range(1000), iter(range(1000)))"),
    State("enumerate in a dict", _scaled("next(self.$['a'])[0]"), "self.$ = {'a': enumerate('ab' * 500)}"),
    State("itertools.count", _scaled("next(self.$)"), "self.$ = itertools.count()"),
    State("itertools.cycle", _scaled("next(self.$)"), "self.$ = itertools.cycle([1, 2, 3])"),
    State("reversed", _scaled("0.01 * next(self.$)"), "self.$ = reversed(list(range(1000)))"),
    State("map", _scaled("next(self.$)"), "self.$ = map(abs, iter(range(1000)))"),
    State(
        "iterator of the user's class",
        _scaled("next(self.$)"),
        "self.$ = Count_$()",
        above="class Count_$:\n    n = 0\n\n    def __iter__(self):\n        return self\n\n"
        "    def __next__(self):\n        self.n += 1\n        return self.n\n",
    ),
    State(
        "generator",
        _scaled("next(self.$)"),
        "self.$ = numbers_$()",
        above="def numbers_$():\n    n = 0\n    while True:\n        n += 1\n        yield n\n",
        measurable=False,
        excludes=tags("deepcopy"),
    ),
    State(
        "second loader",
        _scaled("next(self.$)[0].square().mean()"),
        "self.$ = iter(DataLoader(TensorDataset(torch.rand(400, 2)), 4, shuffle=True))",
        measurable=False,
        excludes=tags("deepcopy"),
    ),
]

METRICS_AND_LOGS = [
    State(
        "metric, registered and logged",
        "self.$(loss.detach())\nself.log('$', self.$, on_step=True, on_epoch=True)\n"
        "loss = loss * (1 + 0.1 * self.$.compute())",
        "self.$ = torchmetrics.MeanMetric()",
    ),
    State(
        "metric hidden in a dict",
        _scaled("self.$['a'].compute()", "self.$['a'].update(loss.detach())"),
        "self.$ = {'a': torchmetrics.MeanMetric()}",
    ),
    State(
        "metrics in a list",
        _scaled("self.$[0].compute().mean()", "self.$[0](loss.detach())"),
        "self.$ = [torchmetrics.CatMetric(), torchmetrics.SumMetric()]",
    ),
    State(
        "log by step and by epoch", "self.log('$', loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x))"
    ),
    State(
        "log_dict with a sum over the epoch",
        "self.log_dict({'$': loss, '$2': 1.0}, on_step=False, on_epoch=True, reduce_fx='sum', batch_size=len(x))",
    ),
    State(
        "self.log handed to a module",
        "loss = self.$(out, y) + 0.5 * loss",
        "self.$ = Criterion_$(self.log)",
        above="class Criterion_$(nn.Module):\n"
        "    def __init__(self, log):\n        super().__init__()\n        self.log = log\n\n"
        "    def forward(self, out, y):\n        loss = F.l1_loss(out, y)\n"
        "        self.log('inner_$', loss, on_epoch=True, batch_size=len(y))\n        return loss\n",
    ),
    State(
        "logger used by hand",
        "self.logger.experiment.add_scalar('$', float(loss))\n"
        "self.logger.log_metrics({'$': float(loss)}, step=self.global_step)",
    ),
    State("what was logged is read", _scaled("float(self.trainer.callback_metrics.get('loss', 0.0))")),
    State(
        "writer of the user's class",
        "self.$.add(float(loss))\n" + _scaled("self.$.n"),
        "self.$ = Writer_$()",
        above="class Writer_$:\n    def __init__(self):\n        self.n, self.stream = 0, io.StringIO()\n\n"
        "    def add(self, value):\n        self.n += 1\n        self.stream.write(f'{value}\\n')\n",
    ),
    State("print and module logger", "logging.getLogger('user').debug('loss %s', loss)"),
]

DERIVATIVES = [
    State(
        "FGSM by autograd.grad",
        before="x = x.detach().requires_grad_()\n(slope,) = torch.autograd.grad(F.mse_loss(self.net(x), y), x)\n"
        "x = (x + 0.05 * slope.sign()).detach()",
        excludes=tags("derivative", "derivative of the network"),
    ),
    State(
        "FGSM by backward",
        before="x = x.detach().clone().requires_grad_()\nF.mse_loss(self.net(x), y).backward()\n"
        "x = (x + 0.05 * x.grad.sign()).detach()",
        excludes=tags("derivative"),
    ),
    State(
        "gradient penalty",
        "z = x.detach().requires_grad_()\n(slope,) = torch.autograd.grad(self.net(z).sum(), z, create_graph=True)\n"
        "loss = loss + 0.1 * slope.square().mean()",
        excludes=tags("derivative", "derivative of the network", "no third derivative"),
    ),
    State(
        "MAML",
        "named = {n: p for n, p in self.net.named_parameters() if p.requires_grad}\n"
        "slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True, allow_unused=True)\n"
        "adapted = {n: p if g is None else p - 0.05 * g for (n, p), g in zip(named.items(), slopes)}\n"
        "loss = loss + F.mse_loss(torch.func.functional_call(self.net, adapted, (x,)), y)",
        excludes=tags(
            "derivative", "derivative of the network", "no third derivative", "slow third derivative", "two names"
        ),
    ),
    State(
        "Jacobian by torch.func",
        "loss = loss + 0.1 * torch.func.vmap(torch.func.jacrev(self.$))(x).square().mean()",
        "self.$ = nn.Sequential(nn.Linear(4, 2), nn.Tanh())",
        excludes=tags("derivative"),
    ),
    State(
        "gradient of the last step is read",
        _scaled(
            "torch.stack([p.grad.square().sum() for p in self.parameters() if p.grad is not None] "
            "+ [torch.zeros(())]).sum().tanh()"
        ),
    ),
    State(
        "tensor hook made in the step",
        "out.register_hook(lambda grad: self.kept_$.append(float(grad.norm())))\n" + _scaled("len(self.kept_$)"),
        "self.kept_$ = []",
    ),
    State(
        "gradient scaled by a hook on a parameter made in the step",
        "handle = self.$.register_hook(lambda grad: grad * 1.0)\nself.n_$ += 1\nhandle.remove()\n"
        "loss = loss + 0.1 * self.n_$ * self.$.square()",
        "self.n_$ = 0\nself.$ = nn.Parameter(torch.tensor(0.5))",
    ),
    State(
        "penalty on parameters",
        "loss = loss + 0.1 * sum(p.square().sum() for p in self.parameters() if isinstance(p, nn.Parameter))",
    ),
    State(
        "parameters as one vector",
        "loss = loss + 0.01 * nn.utils.parameters_to_vector(self.net.parameters()).norm() ** 4",
    ),
    State(
        "own optimizer",
        "self.$2.zero_grad()\n(self.$ - 1).square().sum().backward()\nself.$2.step()\n"
        + _scaled("float(self.$.detach())"),
        "self.$ = torch.zeros(1, requires_grad=True)\nself.$2 = torch.optim.SGD([self.$], lr=0.1, momentum=0.5)",
    ),
    State(
        "own optimizer in an object, of a hidden module",
        "F.mse_loss(self.$.critic(x.detach()), y.detach()).backward()\nself.$.optimizer.step()\n"
        "self.$.optimizer.zero_grad()\n"
        "loss = loss + 0.2 * self.$.critic(x).detach().square().mean() * out.square().mean()",
        "self.$ = types.SimpleNamespace(critic=nn.Linear(4, 2))\n"
        "self.$.optimizer = torch.optim.Adam(self.$.critic.parameters(), lr=0.05)",
    ),
]

WRITES = [
    State(
        "parameters clamped in the step",
        before="with torch.no_grad():\n    for p in self.net.parameters():\n        p.clamp_(-0.8, 0.8)",
    ),
    State("p.data.mul_ in the step", before="for p in self.net.last.parameters():\n    p.data.mul_(0.9)"),
    State("row norms of a weight bounded", before="with torch.no_grad():\n    self.net.last.weight.renorm_(2, 0, 0.7)"),
    State(
        "mode of a layer switched",
        "self.net.first.train(self.global_step % 2 == 0)\n" + _scaled("float(self.net.first.training)"),
    ),
    State(
        "requires_grad off and on",
        "self.$.requires_grad_(False)\nloss = loss + 0.1 * self.$(x).square().mean()\nself.$.requires_grad_(True)\n"
        "loss = loss + 0.1 * self.$(x).mean()",
        "self.$ = nn.Linear(4, 1)",
    ),
    State("gradients switched on for good", before="torch.set_grad_enabled(True)"),
    State("inputs written in place", before="x.mul_(0.9)", provides=tags("writes inputs")),
    State("targets replaced", before="y = y * 0.5 + 0.5 * self.net(x).detach()", excludes=tags("runs net twice")),
]

TRAINER = [
    State(
        "attribute of the trainer",
        _scaled("self.trainer.user_$", "self.trainer.user_$ = getattr(self.trainer, 'user_$', 0) + 1"),
    ),
    State("step and epoch", _scaled("(self.global_step + self.current_epoch + batch_idx)")),
    State(
        "learning rate written in the step",
        _scaled("self.optimizers().param_groups[0]['lr']", "self.optimizers().param_groups[0]['lr'] *= 0.9"),
        excludes=tags("differentiable optimizer"),
    ),
    State(
        "scheduler stepped in the step",
        _scaled("schedule.last_epoch", "schedule = self.lr_schedulers()", "schedule.step()"),
        needs=tags("scheduler"),
    ),
    State("state of the optimizer read", _scaled("len(self.trainer.optimizers[0].state)")),
    State(
        "own on_train_batch_start that anneals",
        "loss = loss * self.$",
        "self.$ = 1.0",
        methods="def on_train_batch_start(self, batch, batch_idx):\n    self.$ = 1.3 ** self.global_step",
        excludes=_STEPS_OWN_START,
    ),
    State(
        "own on_train_batch_start that draws",
        "loss = loss * self.$",
        "self.$ = 1.0",
        methods="def on_train_batch_start(self, batch, batch_idx):\n"
        "    self.$ = 1 + float(torch.rand(())) + random.random()",
        excludes=_STEPS_OWN_START,
    ),
    State(
        "own on_train_batch_start that counts",
        _scaled("len(self.$)"),
        "self.$ = []",
        methods="def on_train_batch_start(self, batch, batch_idx):\n    self.$.append(batch_idx)",
        excludes=_STEPS_OWN_START,
    ),
    State(
        "own on_train_batch_end that counts",
        _scaled("self.$"),
        "self.$ = 0",
        methods="def on_train_batch_end(self, outputs, batch, batch_idx):\n    self.$ += 1",
    ),
    State(
        "epoch hook that resets",
        _scaled("self.$", "self.$ += 1"),
        "self.$ = 0",
        methods="def on_train_epoch_start(self):\n    self.$ = 0",
        excludes=tags("on_train_epoch_start"),
    ),
    State("mapping returned", "result = {'loss': loss, 'n': len(x), 'out': out.detach()}", excludes=tags("result")),
    State(
        "no loss now and then",
        "result = None if batch_idx == 1 else loss",
        excludes=tags("result", "every batch has a loss", "clipping"),
    ),
    State("float64 loss", "loss = loss.double()"),
    State("loss of one element", "result = loss.reshape(1)", excludes=tags("result")),
    State(
        "manual optimisation with curvature_loss",
        "if not backward:\n    return loss\noptimizer = self.optimizers()\noptimizer.zero_grad()\n"
        "self.manual_backward(loss)\noptimizer.step()\nresult = None",
        "self.automatic_optimization = False",
        methods="def curvature_loss(self, batch):\n"
        "    return self.training_step(batch, self.trainer.fit_loop.epoch_loop.batch_idx, backward=False)",
        excludes=tags("result", "manual"),
    ),
]
