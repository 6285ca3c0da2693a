"""Layers and norms: each maps `h`, of shape (batch, 4), to the same shape."""

from tests.generator.ingredients import Layer, tags

_SLOW_THIRD = tags("slow third derivative")
"""Networks that go step by step, MAML, and the detection of anomalies: any two of them in a case take ten seconds."""

_TOKENS = "(h.detach() * 2).long().clamp(-2, 2) + 2"

COUNTING = """
class Scaled_$(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, h):
        self.calls += 1
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0).to(self.mean)
        return h * (1 + 0.05 * self.calls) - self.mean.to(h)
"""

CUBE = """
class Cube_$(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h ** 3

    @staticmethod
    def backward(ctx, grad):
        (h,) = ctx.saved_tensors
        return 3 * h ** 2 * grad
"""

SYMMETRIC = """
class Symmetric_$(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)
"""

RUNNING_PARAMETRIZATION = """
class Running_$(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, centre):
        self.seen += 0.1
        return centre + self.seen
"""

LAYERS = [
    Layer("Linear", "h = self.$(h)", "self.$ = nn.Linear(4, 4)"),
    Layer("ReLU", "h = torch.relu(self.$(h))", "self.$ = nn.Linear(4, 4)"),
    Layer("GELU", "h = F.gelu(self.$(h))", "self.$ = nn.Linear(4, 4, bias=False)"),
    Layer("in-place SiLU", "h = F.silu(self.$(h), inplace=True)", "self.$ = nn.Linear(4, 4)"),
    Layer("PReLU", "h = self.$(h)", "self.$ = nn.PReLU(4)"),
    Layer("RReLU", "h = self.$(h)", "self.$ = nn.RReLU()"),
    Layer("Softplus", "h = self.$(h)", "self.$ = nn.Softplus()"),
    Layer("residual", "h = h + torch.tanh(self.$(h))", "self.$ = nn.Linear(4, 4)"),
    Layer("Bilinear", "h = self.$(h[:, :2], h[:, 2:])", "self.$ = nn.Bilinear(2, 2, 4)", excludes=tags("precision")),
    Layer("Conv1d", "h = self.$(h.unsqueeze(1)).squeeze(1)", "self.$ = nn.Conv1d(1, 1, 3, padding=1)"),
    Layer(
        "Conv2d, channels last",
        "h = self.$(h.view(-1, 1, 2, 2).to(memory_format=torch.channels_last)).mean(1).flatten(1)",
        "self.$ = nn.Conv2d(1, 2, 2, padding='same').to(memory_format=torch.channels_last)",
    ),
    Layer(
        "ConvTranspose1d", "h = self.$(h.view(-1, 2, 2)).flatten(1)", "self.$ = nn.ConvTranspose1d(2, 1, 2, stride=2)"
    ),
    Layer(
        "max pooling",
        "h = F.max_pool1d(self.$(h.unsqueeze(1)), 2).flatten(1)",
        "self.$ = nn.Conv1d(1, 2, 3, padding=1)",
    ),
    Layer("Embedding", f"h = h + self.$({_TOKENS}).squeeze(-1)", "self.$ = nn.Embedding(5, 1)"),
    Layer("Embedding(max_norm)", f"h = h + self.$({_TOKENS}).sum(-1)", "self.$ = nn.Embedding(5, 2, max_norm=0.5)"),
    Layer(
        "Embedding(padding_idx)", f"h = h + self.$({_TOKENS}).squeeze(-1)", "self.$ = nn.Embedding(5, 1, padding_idx=2)"
    ),
    Layer(
        "EmbeddingBag",
        f"h = h + self.$({_TOKENS})",
        "self.$ = nn.EmbeddingBag(5, 4)",
        excludes=tags("no third derivative"),
        exact=False,
    ),
    Layer("LayerNorm", "h = self.$(h)", "self.$ = nn.LayerNorm(4)", excludes=tags("no third derivative")),
    Layer("RMSNorm", "h = self.$(h)", "self.$ = nn.RMSNorm(4)"),
    Layer("BatchNorm1d", "h = self.$(h)", "self.$ = nn.BatchNorm1d(4)", excludes=tags("no third derivative")),
    Layer(
        "BatchNorm1d(momentum=None)",
        "h = self.$(h)",
        "self.$ = nn.BatchNorm1d(4, momentum=None)",
        excludes=tags("no third derivative"),
    ),
    Layer(
        "BatchNorm1d in eval",
        "self.$.eval()\nh = self.$(h)",
        "self.$ = nn.BatchNorm1d(4)",
        excludes=tags("no third derivative"),
    ),
    Layer(
        "BatchNorm2d",
        "h = self.$(h.view(-1, 2, 2, 1)).flatten(1)",
        "self.$ = nn.BatchNorm2d(2)",
        excludes=tags("no third derivative"),
    ),
    Layer("GroupNorm", "h = self.$(h)", "self.$ = nn.GroupNorm(2, 4)"),
    Layer(
        "InstanceNorm1d(track_running_stats)",
        "h = h + self.$(h.view(-1, 2, 2)).flatten(1)",
        "self.$ = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)",
        excludes=tags("no third derivative"),
    ),
    Layer(
        "weight_norm parametrization",
        "h = self.$(h)",
        "self.$ = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))",
    ),
    Layer(
        "weight_norm hook",
        "h = self.$(h)",
        "self.$ = nn.utils.weight_norm(nn.Linear(4, 4))",
        excludes=tags("deepcopy", "deepcopy net"),
    ),
    Layer(
        "spectral_norm parametrization",
        "h = self.$(h)",
        "self.$ = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))",
    ),
    Layer(
        "spectral_norm hook",
        "h = self.$(h)",
        "self.$ = nn.utils.spectral_norm(nn.Linear(4, 4))",
        excludes=tags("deepcopy", "deepcopy net"),
    ),
    Layer(
        "orthogonal parametrization",
        "h = self.$(h)",
        "self.$ = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map='cayley')",
    ),
    Layer(
        "own parametrization",
        "with nn.utils.parametrize.cached():\n    h = self.$(torch.tanh(self.$(h)))",
        "self.$ = nn.Linear(4, 4)\nnn.utils.parametrize.register_parametrization(self.$, 'weight', Symmetric_$())",
        above=SYMMETRIC,
    ),
    Layer(
        "parametrized buffer",
        "h = h + self.$.centre",
        "self.$ = nn.Module()\nself.$.register_buffer('centre', torch.zeros(4))\n"
        "nn.utils.parametrize.register_parametrization(self.$, 'centre', Running_$())",
        above=RUNNING_PARAMETRIZATION,
    ),
    Layer(
        "LSTM",
        "h = self.$(h.view(-1, 2, 2))[0].flatten(1)",
        "self.$ = nn.LSTM(2, 2, batch_first=True)",
        excludes=_SLOW_THIRD,
    ),
    Layer(
        "bidirectional GRU with dropout",
        "h = self.$(h.view(-1, 4, 1))[0].sum(-1)",
        "self.$ = nn.GRU(1, 1, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)",
        excludes=_SLOW_THIRD,
    ),
    Layer("RNNCell", "h = self.$(h[:, 2:], h[:, :2]).repeat(1, 2)", "self.$ = nn.RNNCell(2, 2)"),
    Layer(
        "MultiheadAttention",
        "z = h.view(-1, 2, 2)\nh = h + self.$(z, z, z, need_weights=False)[0].flatten(1)",
        "self.$ = nn.MultiheadAttention(2, 1, dropout=0.2, batch_first=True)",
    ),
    Layer(
        "MultiheadAttention with weights",
        "z = h.view(-1, 2, 2)\nh = h + self.$(z, z, z)[0].flatten(1)",
        "self.$ = nn.MultiheadAttention(2, 2, batch_first=True)",
    ),
    Layer(
        "scaled_dot_product_attention",
        "z = h.view(-1, 1, 2, 2)\nh = h + F.scaled_dot_product_attention(self.$(z), z, z, is_causal=True).flatten(1)",
        "self.$ = nn.Linear(2, 2)",
    ),
    Layer(
        "TransformerEncoderLayer",
        "h = self.$(h.view(-1, 2, 2)).flatten(1)",
        "self.$ = nn.TransformerEncoderLayer(2, 1, 2, dropout=0.1, activation='gelu', batch_first=True)",
    ),
    Layer("Dropout", "h = self.$(h)", "self.$ = nn.Dropout(0.3)"),
    Layer("Dropout1d", "h = self.$(h.view(-1, 2, 2)).flatten(1)", "self.$ = nn.Dropout1d(0.3)"),
    Layer("AlphaDropout", "h = self.$(h)", "self.$ = nn.AlphaDropout(0.2)"),
    Layer("FeatureAlphaDropout", "h = self.$(h.view(-1, 2, 2)).flatten(1)", "self.$ = nn.FeatureAlphaDropout(0.2)"),
    Layer("Gumbel softmax", "h = h * F.gumbel_softmax(self.$(h), tau=2.0)", "self.$ = nn.Linear(4, 4)"),
    Layer("noise of torch", "h = h + 0.3 * torch.randn_like(h)"),
    Layer("noise of NumPy", "h = h * float(np.random.uniform(0.5, 1.5))"),
    Layer("stochastic depth by Python", "if random.random() < 0.7:\n    h = h + self.$(h)", "self.$ = nn.Linear(4, 4)"),
    Layer(
        "tied weights",
        "h = self.$(torch.tanh(self.first(h)))",
        "self.$ = nn.Linear(4, 4)\nself.$.weight = self.first.weight",
    ),
    Layer(
        "the same layer under two names",
        "h = torch.tanh(self.$2(h))",
        "self.$ = nn.Linear(4, 4)\nself.$2 = self.$",
        excludes=tags("two names"),
    ),
    Layer("frozen layer", "h = self.$(h)", "self.$ = nn.Linear(4, 4).requires_grad_(False)"),
    Layer("frozen bias", "h = self.$(h)", "self.$ = nn.Linear(4, 4)\nself.$.bias.requires_grad_(False)"),
    Layer("unused layer", "h = h.clone()", "self.$ = nn.Linear(2, 2)"),
    Layer("layer used now and then", "if h.sum() > 0:\n    h = self.$(h)", "self.$ = nn.Linear(4, 4)"),
    Layer("0-dim parameter", "h = h * self.$", "self.$ = nn.Parameter(torch.tensor(1.5))"),
    Layer(
        "ParameterList and ParameterDict",
        "h = h * self.$[0] + self.$2['b']",
        "self.$ = nn.ParameterList([torch.ones(4)])\nself.$2 = nn.ParameterDict({'b': torch.zeros(4)})",
    ),
    Layer(
        "one-dimensional view of a parameter", "h = h @ self.$.view(4, 4)", "self.$ = nn.Parameter(torch.randn(16) / 2)"
    ),
    Layer(
        "lazily initialised layer",
        "h = self.$(h)",
        "self.$ = nn.LazyLinear(4)",
        "self.net(torch.zeros(2, 4))",
        excludes=tags("lazy"),
    ),
    Layer(
        "reentrant checkpoint",
        "h = torch.utils.checkpoint.checkpoint(self.$, h, use_reentrant=True)",
        "self.$ = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2))",
        excludes=tags("derivative of the network"),
        reference=("use_reentrant=True", "use_reentrant=False"),
    ),
    Layer(
        "non-reentrant checkpoint",
        "h = torch.utils.checkpoint.checkpoint(self.$, h, use_reentrant=False)",
        "self.$ = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2))",
    ),
    Layer("state in a layer", "h = self.$(h)", "self.$ = Scaled_$()", above=COUNTING),
    Layer(
        "forward hook that keeps activations",
        "h = self.$(h) * (1 + 0.02 * len(self.kept_$))",
        "self.kept_$ = []\nself.$ = nn.Linear(4, 4)\n"
        "self.$.register_forward_hook(lambda module, inputs, output: self.kept_$.append(output.detach()))",
    ),
    Layer(
        "forward pre-hook that counts",
        "h = self.$(h)",
        "count = [0]\nself.$ = nn.Linear(4, 4)\n"
        "def scale(module, inputs, count=count):\n    count[0] += 1\n    return (inputs[0] * (1 + 0.05 * count[0]),)\n"
        "self.$.register_forward_pre_hook(scale)",
    ),
    Layer(
        "full backward hook that counts",
        "h = self.$(h * (1 + 0.02 * self.count_$))",
        "self.count_$ = 0\nself.$ = nn.Linear(4, 4)\n"
        "self.$.register_full_backward_hook(lambda *args: vars(self).update(count_$=self.count_$ + 1))",
        excludes=tags("derivative"),  # of the step's own: the replica's modules have no such hooks
    ),
    Layer(
        "hook on a parameter that counts",
        "h = self.$(h * (1 + 0.02 * len(self.kept_$)))",
        "self.kept_$ = []\nself.$ = nn.Linear(4, 4)",
        "self.net.$.weight.register_hook(lambda grad: self.net.kept_$.append(float(grad.norm())))",
    ),
    Layer(
        "post-accumulate hook on a parameter",
        "h = self.$(h * (1 + 0.02 * len(self.kept_$)))",
        "self.kept_$ = []\nself.$ = nn.Linear(4, 4)",
        "self.net.$.weight.register_post_accumulate_grad_hook(lambda p: self.net.kept_$.append(1))",
    ),
    Layer("own autograd function", "h = 0.1 * Cube_$.apply(self.$(h))", "self.$ = nn.Linear(4, 4)", above=CUBE),
    Layer(
        "vmap over functional_call",
        "named = dict(self.$.named_parameters())\n"
        "h = torch.func.vmap(lambda row: torch.func.functional_call(self.$, named, (row,)))(h)",
        "self.$ = nn.Sequential(nn.Linear(4, 4), nn.Tanh())",
    ),
    Layer(
        "weights made from weights",
        "h = F.linear(h, torch.outer(self.$, self.$.flip(0)))",
        "self.$ = nn.Parameter(torch.randn(4))",
    ),
    Layer(
        "torch.compile",
        "h = self.$(h)",
        "self.$ = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend='aot_eager')",
        slow=True,
        excludes=tags("compile", "derivative of the network"),
        reference=("torch.compile(", "(lambda layer, backend: layer)("),
    ),
    Layer("traced layer", "h = self.$(h)", "self.$ = torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 4))", slow=True),
]
