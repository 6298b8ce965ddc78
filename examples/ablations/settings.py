"""Which models are trained, and what each lacks of Chameleon's recipes (arXiv 2405.09818, section 2.3)."""

from dataclasses import dataclass

DROPOUT, SWIN = "model.dropout=0.1", "model.norm_order=swin"
NO_QK_NORM, NO_Z_LOSS = "model.qk_norm=none", "training.z_loss=0"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model."""

    name: str
    """In the report, and of its folder."""
    overrides: tuple[str, ...]
    """Of `train.yaml`."""
    what: str
    """In words."""


SETTINGS = (
    Setting(name="7b", overrides=(DROPOUT,), what="the 7B's recipe: QK-norm, z-loss, dropout, norms first"),
    Setting(name="7b-no-qk-norm", overrides=(DROPOUT, NO_QK_NORM), what="without QK-norm"),
    Setting(name="7b-no-z-loss", overrides=(DROPOUT, NO_Z_LOSS), what="without z-loss"),
    Setting(
        name="7b-no-dropout",
        overrides=(),
        what="without dropout; the same as the 34B's recipe without norm re-ordering",
    ),
    Setting(name="7b-no-qk-norm-no-dropout", overrides=(NO_QK_NORM,), what="without both, as in Figure 5a"),
    Setting(name="34b", overrides=(SWIN,), what="the 34B's recipe: QK-norm, z-loss, no dropout, norms re-ordered"),
    Setting(name="34b-no-qk-norm", overrides=(SWIN, NO_QK_NORM), what="without QK-norm"),
    Setting(name="34b-no-z-loss", overrides=(SWIN, NO_Z_LOSS), what="without z-loss"),
)
