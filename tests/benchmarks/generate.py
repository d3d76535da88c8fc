"""Decoding with drafts against plain decoding: tokens a second, and the speed-up drafts allow.

    python tests/benchmarks/generate.py [--preset cpu|tiny] [--runs DIR] [--json FILE]
        [--models NAME …] [--batches N …] [--recursion by_depth|extended]

Models of text are trained first, unless `DIR` holds them from an earlier call: that of the default
training run, and one of 12 wide layers, next to which a prediction depth is small. Held-out prompts
are then continued greedily, alone and eight at a time, with 0 … 4 drafts per step.

`ideal` is the speed-up if a step took no longer than its passes, τ · t_plain / (t_verify + drafts ·
t_draft), where t_plain is a pass of the main model over one token, t_verify one over the last token
and the drafts, and t_draft one of a prediction depth over one token, each with the head. They are
timed in the same rounds as whole generations, in turn, so that what else the machine does meets all
of them alike; figures are medians. A step takes more than that: a depth runs drafts + 1 places, not
one, once their tokens are verified, or its cache would not be that of the text (`anew` is the time
for the places beyond the first; `with_anew` the speed-up if a step took no longer than its passes
and that); and tokens are chosen, judged and committed (`rest`).
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from harness import Timed, table, write_json
from jax import lax

import equinox_mtp as emtp
from equinox_mtp.speculative import DecodingModel, generate
from equinox_mtp.training import TrainConfig, held_out_prompts, load_corpus, load_model, train
from equinox_mtp.training._checkpoint_files import checkpoints


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is trained and measured."""

    models: dict[str, TrainConfig]
    batches: tuple[int, ...]
    all_drafts: tuple[int, ...]
    prompt: int
    max_new_tokens: int
    rounds: int


DEEP = TrainConfig(
    num_layers=12, embed_size=384, num_heads=6, steps=250, learning_rate=2e-3, eval_every=125
)
TINY = TrainConfig(
    num_layers=2,
    embed_size=16,
    num_heads=2,
    mlp_size=32,
    batch_size=2,
    seq_len=32,
    steps=4,
    eval_rows=2,
)
PRESETS = {
    "cpu": Preset({"default": TrainConfig(), "deep": DEEP}, (1, 8), (0, 1, 2, 3, 4), 64, 192, 3),
    "tiny": Preset({"tiny": TINY}, (1, 2), (0, 2), 8, 12, 1),
}
PASSES = 64


def trained(config: TrainConfig, folder: Path) -> tuple[emtp.MTPModel, float]:
    """The model of a run in `folder`, and the seconds its training took; trains it if need be."""
    seconds = folder / "training_seconds.json"
    if not (seconds.is_file() and checkpoints(folder / "checkpoints")):
        started = time.perf_counter()
        train(dataclasses.replace(config, out=folder, compare_prompts=0))
        seconds.write_text(json.dumps(time.perf_counter() - started))
    return load_model(folder)[0], json.loads(seconds.read_text())


def main_pass(model: DecodingModel, batch: int, max_length: int, num_tokens: int) -> Timed:
    """A pass of the main model over a few tokens, with the head; again and again in one loop."""
    decoder = model.decoder
    ids = jnp.zeros((batch, num_tokens), jnp.int32)
    position_ids = jnp.broadcast_to(max_length // 2 + jnp.arange(num_tokens), ids.shape)

    def run(_: Any, carry: Any) -> Any:
        ids, cache = carry
        hidden_states, cache = decoder.decode(ids, cache, position_ids=position_ids)
        logits = model.logits(decoder.final_norm(hidden_states))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return repeated(run, (ids, decoder.init_cache(batch, max_length)))


def draft_pass(model: DecodingModel, batch: int, max_length: int, num_places: int) -> Timed:
    """A pass of the first prediction depth over a few places, with the head for the last."""
    decoder, layer = model.decoder, model.layer(1)
    ids = jnp.zeros((batch, num_places), jnp.int32)
    position_ids = jnp.broadcast_to(max_length // 2 + jnp.arange(num_places), ids.shape)
    embeddings = decoder.embed(ids, position_ids)
    transformer_layer: Any = layer.transformer_layer
    cache = transformer_layer.init_cache(batch, max_length, embeddings.dtype)

    def run(_: Any, carry: Any) -> Any:
        ids, hidden_states, cache = carry
        embeddings = decoder.embed(ids, position_ids)
        hidden_states, cache = layer.decode(
            hidden_states, embeddings, cache, position_ids=position_ids
        )
        logits = model.logits(decoder.final_norm(hidden_states)[:, -1:])
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jnp.broadcast_to(best, ids.shape), hidden_states, cache

    return repeated(run, (ids, embeddings, cache))


def repeated(run: Callable[[Any, Any], Any], carry: Any) -> Timed:
    """`PASSES` passes in one compiled loop."""
    loop = jax.jit(lambda carry: lax.fori_loop(0, PASSES, run, carry))
    return Timed(lambda: loop(carry), PASSES)


def measure(
    name: str,
    model: emtp.MTPModel,
    prompts: np.ndarray,
    batch: int,
    preset: Preset,
    recursion: Any = "by_depth",
) -> list[dict[str, Any]]:
    """All rows of one model and batch size."""
    decoding = eqx.filter_jit(DecodingModel.of)(model)
    max_length = preset.prompt + preset.max_new_tokens
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]

    def run(drafts: int, max_new_tokens: int) -> list[emtp.speculative.Generation]:
        return [
            generate(
                decoding,
                rows,
                max_new_tokens=max_new_tokens,
                num_drafts=drafts,
                recursion=recursion,
            )
            for rows in batches
        ]

    all_drafts = preset.all_drafts
    whole = {k: Timed(functools.partial(run, k, preset.max_new_tokens)) for k in all_drafts}
    prefills = {k: Timed(functools.partial(run, k, 1)) for k in all_drafts}
    passes = {k: main_pass(decoding, batch, max_length, k + 1) for k in all_drafts}
    drafts = {k: draft_pass(decoding, batch, max_length, k + 1) for k in all_drafts}
    for _ in range(preset.rounds):
        for group in (whole, prefills, passes, drafts):
            for timed in group.values():
                timed.run()
    return [
        row_of(name, batch, k, whole, prefills[k], passes, drafts, len(batches)) for k in all_drafts
    ]


def row_of(
    name: str,
    batch: int,
    drafts: int,
    whole: dict[int, Timed],
    prefill: Timed,
    passes: dict[int, Timed],
    draft_passes: dict[int, Timed],
    num_batches: int,
) -> dict[str, Any]:
    """What the times of one number of drafts come to."""
    generations = whole[drafts].result
    total = jax.tree.map(lambda *x: jnp.concatenate(x), *generations)
    tokens_per_pass = float(total.tokens_per_pass)
    # A loop runs until its slowest row is done.
    num_steps = sum(int(generation.num_steps.max()) for generation in generations)
    seconds, plain, verify = whole[drafts].seconds, passes[0].seconds, passes[drafts].seconds
    step = (seconds - prefill.seconds) / num_steps
    speedup = whole[0].seconds / seconds
    draft, anew = draft_passes[0].seconds, draft_passes[drafts].seconds - draft_passes[0].seconds
    ideal = tokens_per_pass * plain / (verify + drafts * draft)
    with_anew = tokens_per_pass * plain / (verify + drafts * (draft + anew))
    return {
        "model": name,
        "batch": batch,
        "drafts": drafts,
        "tokens_per_s": int(total.num_generated.sum()) / seconds,
        "speedup": speedup,
        "ideal_speedup": ideal,
        "of_ideal": speedup / ideal,
        "with_anew": with_anew,
        "of_with_anew": speedup / with_anew,
        "tokens_per_pass": tokens_per_pass,
        "accepted_per_position": total.accepted_per_position.tolist(),
        "same_tokens_as_plain": same_tokens(generations, whole[0].result),
        "prefill_s": prefill.seconds / num_batches,
        "step_s": step,
        "verify_s": verify,
        "draft_s": draft if drafts else 0.0,
        "anew_s": drafts * anew,
        "rest_s": step - verify - drafts * (draft + anew),
    }


def same_tokens(generations: list[Any], plain: list[Any]) -> float:
    """The share of rows with the tokens of plain decoding."""
    pairs = zip(generations, plain, strict=True)
    return float(np.mean([np.all(x.tokens == y.tokens, axis=1) for x, y in pairs]))


def print_table(rows: list[dict[str, Any]]) -> None:
    """A table for people, and for README."""
    columns = ("model", "batch", "drafts", "tokens/s", "speed-up", "ideal: of it")
    columns += ("with places run anew: of it", "τ", "accepted")
    columns += ("step (µs) = verify + drafts + anew + rest",)
    lines = []
    for row in rows:
        step, verify, anew, rest = (
            1e6 * row[name] for name in ("step_s", "verify_s", "anew_s", "rest_s")
        )
        drafts = 1e6 * row["drafts"] * row["draft_s"]
        lines.append(
            (
                row["model"],
                row["batch"],
                row["drafts"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['speedup']:.2f}",
                f"{row['ideal_speedup']:.2f}: {row['of_ideal']:.2f}",
                f"{row['with_anew']:.2f}: {row['of_with_anew']:.2f}",
                f"{row['tokens_per_pass']:.2f}",
                " ".join(f"{rate:.0%}" for rate in row["accepted_per_position"]) or "-",
                f"{step:,.0f} = {verify:,.0f} + {drafts:,.0f} + {anew:,.0f} + {rest:,.0f}",
            )
        )
    print(f"\n{table(columns, lines)}")
    same = min(row["same_tokens_as_plain"] for row in rows)
    print(f"\nAt least {same:.0%} of the continuations are those of plain decoding.")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--runs", type=Path, help="where trained models are kept, and looked for")
    parser.add_argument("--models", nargs="+", help="only these of the preset's models")
    parser.add_argument("--batches", type=int, nargs="+", help="only these batch sizes")
    parser.add_argument(
        "--recursion", choices=("by_depth", "extended"), default="by_depth", help="see `generate`"
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    preset = dataclasses.replace(
        preset,
        models={name: preset.models[name] for name in arguments.models or preset.models},
        batches=tuple(arguments.batches or preset.batches),
    )
    held_out = load_corpus(()).split(0)[1]
    prompts = np.stack(held_out_prompts(held_out, num_prompts=8, length=preset.prompt))
    rows, training_seconds = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        for name, config in preset.models.items():
            model, training_seconds[name] = trained(config, runs / name)
            print(f"{name}: trained in {training_seconds[name]:.0f} s", file=sys.stderr)
            for batch in preset.batches:
                rows += measure(name, model, prompts, batch, preset, arguments.recursion)
                print_table(rows)
                # So many programs of so many layers each are more than a process may map at once.
                jax.clear_caches()
    report = {"preset": arguments.preset, "training_seconds": training_seconds, "rows": rows}
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
