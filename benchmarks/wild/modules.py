"""LightningModules of other people's packages, with small data that is made here: nothing is downloaded.

Hugging Face's networks come without a LightningModule; they stand in a thin one. All the others are used as they are.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.wild.methods import METHODS
from benchmarks.wild.sciences import SCIENCES
from benchmarks.wild.wild_module import WildModule


def _waves(series: int = 8, length: int = 80) -> np.ndarray:
    """Noisy waves of different periods and heights, one to a row."""
    generator, time = np.random.default_rng(0), np.arange(length)
    periods, heights = generator.uniform(6, 20, (series, 1)), generator.uniform(1, 3, (series, 1))
    return 4 + heights * np.sin(2 * np.pi * time / periods) + 0.2 * generator.standard_normal((series, length))


def _pytorch_forecasting(network: str) -> tuple[Any, Any]:
    import pandas as pd
    from pytorch_forecasting import DeepAR, TemporalFusionTransformer, TimeSeriesDataSet

    waves = _waves()
    series, time = np.indices(waves.shape)
    table = pd.DataFrame({"series": series.ravel().astype(str), "time": time.ravel(), "value": waves.ravel()})
    data = TimeSeriesDataSet(
        table,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=16,
        max_prediction_length=6,
        static_categoricals=["series"],
        time_varying_known_reals=["time"],
        time_varying_unknown_reals=["value"],
    )
    if network == "DeepAR":
        module = DeepAR.from_dataset(data, hidden_size=8, rnn_layers=2, dropout=0.1, learning_rate=1e-2)
    else:
        module = TemporalFusionTransformer.from_dataset(
            data, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, dropout=0.1, learning_rate=1e-2
        )
    return module, data.to_dataloader(train=True, batch_size=16, num_workers=0)


def _gluonts() -> tuple[Any, Any]:
    from gluonts.torch.model.deepar import DeepARLightningModule

    context, horizon, lags = 12, 6, [1, 2, 6]
    module = DeepARLightningModule(
        model_kwargs={
            "freq": "D",
            "context_length": context,
            "prediction_length": horizon,
            "num_feat_dynamic_real": 1,
            "num_feat_static_real": 1,
            "num_feat_static_cat": 1,
            "cardinality": [8],
            "hidden_size": 12,
            "lags_seq": lags,
        },
        lr=1e-2,
    )
    waves = torch.from_numpy(_waves()).float()
    past = context + max(lags)
    rows = []
    for series, values in enumerate(waves):
        for start in range(0, len(values) - past - horizon, 5):
            ages = torch.arange(start, start + past + horizon).float().log1p().unsqueeze(1)
            window = values[start : start + past + horizon]
            rows.append(
                {
                    "feat_static_cat": torch.tensor([series]),
                    "feat_static_real": torch.zeros(1),
                    "past_time_feat": ages[:past],
                    "future_time_feat": ages[past:],
                    "past_target": window[:past],
                    "future_target": window[past:],
                    "past_observed_values": torch.ones(past),
                    "future_observed_values": torch.ones(horizon),
                }
            )
    return module, DataLoader(rows, 16, shuffle=True)  # type: ignore[arg-type]


def _chemprop() -> tuple[Any, Any]:
    from chemprop.data import MoleculeDatapoint, MoleculeDataset, build_dataloader
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    groups = ["O", "N", "Cl", "C(=O)O", "c1ccccc1", "C#N", "OC", "F"]
    molecules = ["C" * length + group for length in range(1, 9) for group in groups]
    points = [MoleculeDatapoint.from_smi(smiles, [0.2 * len(smiles) + smiles.count("C") / 8]) for smiles in molecules]
    module = MPNN(
        BondMessagePassing(d_h=16, depth=3, dropout=0.1),
        MeanAggregation(),
        RegressionFFN(input_dim=16, hidden_dim=12, dropout=0.1),
        batch_norm=True,
    )
    return module, build_dataloader(MoleculeDataset(points), batch_size=16, num_workers=0)


def _clusters(size: int = 128, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, features, generator=generator)
    labels = torch.arange(size) % classes
    return centres[labels] + 0.6 * torch.randn(size, features, generator=generator), labels


def _torch_uncertainty() -> tuple[Any, Any]:
    from torch_uncertainty.losses import ELBOLoss
    from torch_uncertainty.models.mlp import bayesian_mlp
    from torch_uncertainty.routines import ClassificationRoutine

    inputs, labels = _clusters()
    network = bayesian_mlp(in_features=inputs.shape[1], num_outputs=3, hidden_dims=[16])
    module = ClassificationRoutine(
        model=network,
        num_classes=3,
        loss=ELBOLoss(network, torch.nn.CrossEntropyLoss(), kl_weight=1e-3, num_samples=3),
        optim_recipe=torch.optim.Adam(network.parameters(), lr=1e-2),
    )
    return module, DataLoader(TensorDataset(inputs, labels), 16, shuffle=True)


def _neuralforecast() -> tuple[Any, Any]:
    import pandas as pd
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import NHITS
    from neuralforecast.tsdataset import TimeSeriesDataModule, TimeSeriesDataset

    waves = _waves()
    series, time = np.indices(waves.shape)
    table = pd.DataFrame({"unique_id": series.ravel(), "ds": time.ravel(), "y": waves.ravel()})
    data, *_ = TimeSeriesDataset.from_df(table)
    module = NHITS(
        h=6,
        input_size=18,
        mlp_units=[[16, 16]] * 3,
        dropout_prob_theta=0.1,
        loss=MQLoss(level=[80]),
        scaler_type="standard",
        windows_batch_size=32,
        learning_rate=1e-2,
    )
    return module, TimeSeriesDataModule(data, batch_size=4)


def _pytorch_tabular() -> tuple[Any, Any]:
    import pandas as pd
    from pytorch_tabular import TabularModel
    from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
    from pytorch_tabular.models import FTTransformerConfig

    inputs, labels = _clusters()
    names = [f"x{index}" for index in range(inputs.shape[1])]
    table = pd.DataFrame(inputs.numpy(), columns=names)
    table["kind"] = np.where(inputs[:, 0] > 0, "up", "down")
    table["label"] = labels.numpy()
    whole = TabularModel(
        data_config=DataConfig(target=["label"], continuous_cols=names, categorical_cols=["kind"]),
        model_config=FTTransformerConfig(
            task="classification", input_embed_dim=16, num_heads=2, num_attn_blocks=2, learning_rate=1e-2
        ),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(batch_size=16, progress_bar="none"),
        verbose=False,
    )
    data = whole.prepare_dataloader(train=table, validation=table[:32], seed=7)
    return whole.prepare_model(data), data.train_dataloader()


class HuggingFace(pl.LightningModule):
    """A network of Hugging Face in the LightningModule that everybody writes for it."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss that the network itself returns."""
        loss = self.network(**batch).loss
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as for all of them."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def _hugging_face(network: str) -> tuple[Any, Any]:
    import transformers as hf

    words, length = 48, 16
    generator = torch.Generator().manual_seed(0)
    starts, strides = torch.randint(words, (2, 96, 1), generator=generator)
    tokens = (starts + (1 + strides % 4) * torch.arange(length)) % words
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    if network == "BERT":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = hf.BertForSequenceClassification(hf.BertConfig(vocab_size=words, num_labels=4, **sizes))
        rows = [{"input_ids": row, "labels": stride % 4} for row, stride in zip(tokens, strides[:, 0], strict=True)]
    elif network == "Llama":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=words, num_key_value_heads=1, **sizes))
    elif network == "T5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=words, decoder_start_token_id=0, **sizes))
    else:
        sizes = {"n_positions": length, "n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False}
        sizes |= {"vocab_size": words, "bos_token_id": 0, "eos_token_id": 0}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))
        model.gradient_checkpointing_enable()
    model.train()
    return HuggingFace(model), DataLoader(rows, 16, shuffle=True)  # type: ignore[arg-type]


WILD_MODULES = (
    WildModule("pytorch-forecasting", "TemporalFusionTransformer", lambda: _pytorch_forecasting("TFT")),
    WildModule("pytorch-forecasting", "DeepAR", lambda: _pytorch_forecasting("DeepAR")),
    WildModule("gluonts", "DeepARLightningModule", _gluonts),
    WildModule("chemprop", "MPNN", _chemprop),
    WildModule("torch-uncertainty", "ClassificationRoutine (Bayesian MLP)", _torch_uncertainty),
    WildModule("neuralforecast", "NHITS", _neuralforecast, library="pytorch_lightning"),
    WildModule("pytorch-tabular", "FTTransformerModel", _pytorch_tabular, library="pytorch_lightning"),
    WildModule("transformers", "BERT", lambda: _hugging_face("BERT")),
    WildModule("transformers", "GPT-2, gradient checkpointing", lambda: _hugging_face("GPT-2")),
    WildModule("transformers", "Llama", lambda: _hugging_face("Llama")),
    WildModule("transformers", "T5", lambda: _hugging_face("T5")),
    *SCIENCES,
    *METHODS,
)
