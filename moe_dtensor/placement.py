"""Where every parameter lives: one table from its name to its place on the mesh. Data only, no process group.

FSDP splits the model width D of every weight over dp, tensor and expert parallelism split heads, hidden
units, vocabulary rows or experts over tp. The two never split the same dimension, so no strided shard arises; where tp
is 1 FSDP splits the experts themselves, if dp divides their number.
Experts that live on dp ranks are left out of FSDP: there dp splits the experts themselves. Where several groups of dp
ranks hold the same experts, FSDP may split those across the groups, along the width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from moe_dtensor.config.resolve import expert_shards, shard_ranks
from moe_dtensor.config.schema import Config


@dataclass(frozen=True)
class Row:
    """The placement of all parameters whose name (without ``layers.<i>.``) matches."""

    pattern: str
    """Regular expression for the whole name."""
    dp: int
    """Dimension split over dp; of experts on dp ranks over those that share them."""
    tp: int | None
    """Dimension split over tp; None: each tp rank holds the whole."""
    gradient: Literal["whole", "tokens", "heads"] = "whole"
    """What one tp rank's gradient covers when tp does not split the weight. tokens: its own tokens under sequence
    parallelism, all of them otherwise; heads: its own heads (hidden units) always. A share is summed over tp."""
    fsdp: bool = True
    """Whether FSDP splits, gathers and reduces it over dp. False: each dp rank works with its part alone."""
    groups: int | None = None
    """Of experts on dp ranks: dimension that FSDP splits across the groups that share experts, if it does."""

    @property
    def on_dp(self) -> bool:
        """Whether dp ranks hold different experts, rather than slices of all."""
        return not self.fsdp or self.groups is not None


TABLE: tuple[Row, ...] = (
    Row(r"tok_embeddings\.weight", dp=1, tp=0),
    Row(
        r"(attention_norm|ffn_norm|attention_post_norm|ffn_post_norm|norm)\.(weight|bias)",
        dp=0,
        tp=None,
        gradient="tokens",
    ),
    Row(r"mtp_(embedding_norm|stream_norm|norm)\.(weight|bias)", dp=0, tp=None, gradient="tokens"),
    Row(r"mtp_projection\.weight", dp=0, tp=None, gradient="tokens"),
    Row(r"attention\.(wq|gate)\.weight", dp=1, tp=0),
    Row(r"attention\.w[kv]\.weight", dp=1, tp=0),
    Row(r"attention\.wq\.bias", dp=0, tp=0),
    Row(r"attention\.w[kv]\.bias", dp=0, tp=0),
    Row(r"attention\.wo\.weight", dp=0, tp=1),
    Row(r"attention\.output_bias", dp=0, tp=None, gradient="tokens"),
    Row(r"attention\.sinks", dp=0, tp=0),
    # Every tp rank makes the whole latents, and of them its own heads: its gradient is a share.
    Row(r"attention\.w(q|kv)_a\.weight", dp=1, tp=None, gradient="heads"),
    Row(r"attention\.(q|kv)_a_norm\.weight", dp=0, tp=None, gradient="heads"),
    Row(r"attention\.w(q|kv)_b\.weight", dp=1, tp=0),
    Row(r"attention\.[qk]_norm\.weight", dp=0, tp=0),
    Row(r"feed_forward\.(gate|up)\.weight", dp=1, tp=0),
    Row(r"feed_forward\.(gate|up)\.bias", dp=0, tp=0),
    Row(r"feed_forward\.down\.weight", dp=0, tp=1),
    Row(r"feed_forward\.output_bias", dp=0, tp=None, gradient="tokens"),
    Row(r"moe\.router\.weight", dp=1, tp=None, gradient="tokens"),
    Row(r"moe\.router\.logit_bias", dp=0, tp=None, gradient="tokens"),
    Row(r"moe\.down_bias", dp=1, tp=None, gradient="tokens"),
    Row(r"moe\.shared\.(gate|up)\.weight", dp=1, tp=0),
    Row(r"moe\.shared\.down\.weight", dp=0, tp=1),
    # It multiplies what a rank's hidden units give: its gradient is a sum over them.
    Row(r"moe\.shared\.token_gate\.weight", dp=1, tp=None, gradient="heads"),
    Row(r"output\.weight", dp=1, tp=0),
    Row(r"output\.bias", dp=0, tp=0),
)

UP, DOWN, UP_BIAS = r"moe\.experts\.w_up", r"moe\.experts\.w_down", r"moe\.experts\.up_bias"
EXPERTS: dict[str, tuple[Row, Row, Row]] = {
    "tp": (Row(UP, dp=3, tp=0), Row(DOWN, dp=1, tp=0), Row(UP_BIAS, dp=2, tp=0)),
    "tp_hidden": (Row(UP, dp=3, tp=2), Row(DOWN, dp=1, tp=2), Row(UP_BIAS, dp=0, tp=2)),
    "dp": (
        Row(UP, dp=0, tp=None, gradient="tokens", fsdp=False),
        Row(DOWN, dp=0, tp=None, gradient="tokens", fsdp=False),
        Row(UP_BIAS, dp=0, tp=None, gradient="tokens", fsdp=False),
    ),
    "dp_tp": (Row(UP, dp=0, tp=0, fsdp=False), Row(DOWN, dp=0, tp=0, fsdp=False), Row(UP_BIAS, dp=0, tp=0, fsdp=False)),
}
"""The experts' rows, ``w_up`` (E, G, F, D), ``w_down`` (E, D, F) and ``up_bias`` (E, G, F), by ``mesh.experts``."""


def build_table(config: Config) -> tuple[Row, ...]:
    """The table for one config: its experts' rows, and heads that cannot be split over tp held whole."""
    whole: set[str] = set()
    if config.model.num_kv_heads % config.mesh.tp:
        whole |= {r"attention\.w[kv]\.weight", r"attention\.w[kv]\.bias"}
    experts: tuple[Row, ...] = EXPERTS[config.mesh.experts]
    if config.mesh.tp == 1 and experts[0].fsdp and config.moe.num_experts % shard_ranks(config) == 0:
        # tp leaves the first dimension alone, along which FSDP gathers and scatters without a copy into place.
        experts = tuple(replace(row, dp=0, tp=None) for row in experts)
    if expert_shards(config) > 1:
        # Their width, as FSDP splits it where experts are on tp.
        experts = tuple(
            replace(row, fsdp=True, groups=same.dp) for row, same in zip(experts, EXPERTS["tp"], strict=True)
        )
    rows = []
    for row in (*TABLE, *experts):
        if row.pattern in whole:
            row = Row(row.pattern, row.dp, tp=None, gradient="heads")
        rows += _qk_norm_rows(config) if "[qk]_norm" in row.pattern else [row]
    return tuple(rows)


def _qk_norm_rows(config: Config) -> list[Row]:
    """Over the whole width a norm is split as its projection is; over one head every rank holds it."""
    if config.model.qk_norm == "none":
        return []
    shared = Row(r"attention\.[qk]_norm\.weight", dp=0, tp=None, gradient="heads")
    if config.model.qk_norm != "full":
        return [shared]
    split_kv = config.model.num_kv_heads % config.mesh.tp == 0
    return [
        Row(r"attention\.q_norm\.weight", dp=0, tp=0),
        Row(r"attention\.k_norm\.weight", dp=0, tp=0 if split_kv else None, gradient="heads"),
    ]


def find_row(table: tuple[Row, ...], name: str) -> Row:
    """The one row for a parameter.

    Raises:
        ValueError: no row matches, or more than one.
    """
    short = re.sub(r"^layers\.\d+\.", "", name)
    rows = [row for row in table if re.fullmatch(row.pattern, short)]
    if len(rows) != 1:
        raise ValueError(f"Parameter {name} matches {len(rows)} rows of the placement table; it needs exactly one.")
    return rows[0]
