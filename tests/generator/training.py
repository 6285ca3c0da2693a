"""Optimizers with their schedules, settings of the trainer, and callbacks of the user's own."""

from tests.generator.ingredients import Optimizer, Option, tags

_SIGNS = """
class Signs(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.calls += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"] / self.calls)
        return loss
"""

_SCHEDULED = tags("scheduler")

OPTIMIZERS = [
    Optimizer("SGD"),
    Optimizer("SGD, momentum", "torch.optim.SGD(parameters, lr=0.05, momentum=0.9)"),
    Optimizer("SGD, Nesterov", "torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)"),
    Optimizer("SGD, foreach", "torch.optim.SGD(parameters, lr=0.05, momentum=0.5, foreach=True)"),
    Optimizer("SGD, maximize", "torch.optim.SGD(parameters, lr=0.01, maximize=True)"),
    Optimizer("Adam", "torch.optim.Adam(parameters, lr=0.02)"),
    Optimizer("Adam, AMSGrad, foreach", "torch.optim.Adam(parameters, lr=0.02, amsgrad=True, foreach=True)"),
    Optimizer("AdamW", "torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)"),
    Optimizer("AdamW, fused", "torch.optim.AdamW(parameters, lr=0.02, fused=True)"),
    Optimizer("NAdam", "torch.optim.NAdam(parameters, lr=0.02)"),
    Optimizer("RMSprop", "torch.optim.RMSprop(parameters, lr=0.01, centered=True, momentum=0.5)"),
    Optimizer("Adagrad", "torch.optim.Adagrad(parameters, lr=0.05)"),
    Optimizer("Adadelta", "torch.optim.Adadelta(parameters)"),
    Optimizer("Rprop", "torch.optim.Rprop(parameters, lr=0.01)"),
    Optimizer(
        "LBFGS",
        "torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)",
        excludes=tags("every batch has a loss", "accumulation", "manual"),
    ),
    Optimizer(
        "two groups of different rates",
        "torch.optim.SGD([{'params': parameters[:1], 'lr': 0.01}, {'params': parameters[1:]}], lr=0.1)",
    ),
    Optimizer(
        "a group left out",
        "torch.optim.Adam([p for p in parameters if p.dim() < 2], lr=0.02)",
    ),
    Optimizer(
        "optimizer of the user's class",
        "Signs(parameters, lr=0.02)",
        above=_SIGNS,
    ),
    Optimizer("SGD, StepLR", scheduler="torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)", provides=_SCHEDULED),
    Optimizer(
        "Adam, OneCycleLR by step",
        "torch.optim.Adam(parameters, lr=0.02)",
        "{'scheduler': torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=200), 'interval': 'step'}",
        provides=_SCHEDULED,
    ),
    Optimizer(
        "SGD, cosine by step",
        "torch.optim.SGD(parameters, lr=0.1, momentum=0.5)",
        "{'scheduler': torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10), 'interval': 'step', 'frequency': 2}",
        provides=_SCHEDULED,
    ),
    Optimizer(
        "SGD, LambdaLR with a function that counts",
        scheduler="torch.optim.lr_scheduler.LambdaLR(optimizer, rate)",
        above="def rate(epoch, kept=[]):\n    kept.append(epoch)\n    return 0.9 ** len(kept)\n",
        provides=_SCHEDULED,
    ),
    Optimizer(
        "SGD, ReduceLROnPlateau",
        scheduler="{'scheduler': torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0), 'monitor': 'loss', "
        "'interval': 'step', 'strict': False}",
        excludes=tags("every batch has a loss", "accumulation", "manual"),
    ),
]

OPTIONS = [
    Option("plain"),
    Option(
        "accumulation of 2",
        settings={"accumulate_grad_batches": 2, "max_steps": 3},
        excludes=tags("accumulation", "manual"),
        exact=False,  # all batches of the step are measured together, see `tests/callbacks/test_gauges.py`
    ),
    Option(
        "accumulation of 3",
        settings={"accumulate_grad_batches": 3, "max_steps": 3},
        excludes=tags("accumulation", "manual"),
        exact=False,  # all batches of the step are measured together, see `tests/callbacks/test_gauges.py`
    ),
    Option("clipping by norm", settings={"gradient_clip_val": 0.3}, excludes=tags("clipping", "manual")),
    Option(
        "clipping by value",
        settings={"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
        excludes=tags("clipping", "manual"),
    ),
    Option("64-true", settings={"precision": "64-true"}, excludes=tags("precision", "compile")),
    Option("bf16-mixed", settings={"precision": "bf16-mixed"}, excludes=tags("precision"), exact=False),
    Option("limit_train_batches", settings={"limit_train_batches": 2}, excludes=tags("overfit")),
    Option("overfit_batches", settings={"overfit_batches": 2}, excludes=tags("overfit")),
    Option(
        "validation in the midst",
        settings={"val_check_interval": 2, "limit_val_batches": 2},
        excludes=tags("validation"),
    ),
    Option(
        "sanity check first", settings={"num_sanity_val_steps": 2, "limit_val_batches": 1}, excludes=tags("validation")
    ),
    Option("logging in every step", settings={"log_every_n_steps": 1}),
    Option("epochs instead of steps", settings={"max_epochs": 1, "max_steps": -1}, excludes=tags("length")),
    Option(
        "anomaly detection",  # which notes where each part of a graph was made
        settings={"detect_anomaly": True},
        excludes=tags("slow third derivative"),
    ),
    Option("deterministic", settings={"deterministic": True}),
    Option("inference_mode off", settings={"inference_mode": False}),
    Option(
        "loaders made anew in every epoch", settings={"reload_dataloaders_every_n_epochs": 1}, needs=tags("data module")
    ),
    Option("no logger interval", settings={"log_every_n_steps": 50}),
]

CALLBACKS = [
    Option("LearningRateMonitor", callback="pl.callbacks.LearningRateMonitor('step')"),
    Option("EarlyStopping", callback="pl.callbacks.EarlyStopping('loss', mode='max', patience=3, strict=False)"),
    Option(
        "GradientAccumulationScheduler",
        callback="pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})",
        excludes=tags("accumulation", "manual"),
        exact=False,
    ),
    Option("WeightAveraging", callback="pl.callbacks.EMAWeightAveraging(decay=0.8)", excludes=tags("deepcopy")),
    Option(
        "user's callback that decays weights",
        callback="Decay()",
        above="class Decay(pl.Callback):\n    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        with torch.no_grad():\n            for p in module.parameters():\n                p.mul_(0.99)\n",
        excludes=tags("writes after the measurement"),
        exact=False,
    ),
    Option(
        "user's callback with a forward hook",
        callback="Watch()",
        above="class Watch(pl.Callback):\n    def __init__(self):\n        self.outputs = []\n\n"
        "    def on_train_start(self, trainer, module):\n        module.net.register_forward_hook(\n"
        "            lambda net, inputs, out: self.outputs.append(float(out.detach().double().mean())))\n",
    ),
    Option(
        "user's callback that counts and draws",
        callback="Draw()",
        above="class Draw(pl.Callback):\n    def __init__(self):\n        self.drawn = []\n\n"
        "    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):\n"
        "        self.drawn.append(float(torch.rand(())))\n        module.net.first.bias.data.add_(0.01)\n",
    ),
]
