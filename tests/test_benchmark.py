"""The benchmark scripts run, and write what they say."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FOLDER, reference, tensors_of
from hlo import compile_for, transfers
from jax import lax
from jax.sharding import PartitionSpec as P

from equinox_mtp.sharding import make_mesh

BENCHMARKS = Path(__file__).parent / "benchmarks"


def report_of(script: str, arguments: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """What a benchmark writes, and what it prints."""
    report_file = folder / "report.json"
    # Those of the tests but for the devices: for the rows, not for their numbers.
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    flags = flags.replace("optimization_level=2", "optimization_level=0")
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(report_file)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(report_file.read_text()), done.stdout


@pytest.mark.slow
def test_step_rows_of_every_variant_and_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another implementation's in the same run."""
    peer = """
        import jax.numpy as jnp

        def variant(shape, depths):
            return (lambda x, n: jnp.sum(x * n)), (jnp.ones(shape.embed), depths)
    """
    (tmp_path / "peer.py").write_text(textwrap.dedent(peer))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    arguments = ["--preset", "tiny", "--depths", "1", "2", "--repeats", "1"]
    report, printed = report_of("mtp_step.py", [*arguments, "--against", "peer:variant"], tmp_path)
    assert report["preset"] == "tiny"
    variants = ("fused", "recompute", "naive", "peer:variant")
    assert [(row["depths"], row["variant"]) for row in report["rows"]] == [
        (depths, variant) for depths in (1, 2) for variant in variants
    ]
    for row in report["rows"]:
        # Each is a row of the printed table.
        assert f"| {row['depths']} | {row['variant']} | {row['compile_s']:.1f} " in printed
        assert row["compile_s"] > row["step_s"] > 0
        assert row["matmul_fraction"] > 0
        if row["variant"] != "peer:variant":
            assert row["temp_bytes"] > 0
            assert row["relative_error"] < 1e-4


def test_attention_rows(tmp_path: Path) -> None:
    report, printed = report_of("attention.py", ["--sizes", "tiny", "--rounds", "1"], tmp_path)
    assert [row["variant"] for row in report["rows"]] == ["xla", "library", "packed"]
    xla, library, packed = report["rows"]
    assert library["of_xla"] == pytest.approx(library["seconds"] / xla["seconds"])
    assert packed["temp_bytes"] < xla["temp_bytes"]
    assert library["largest_difference"] < 1e-4
    assert "| 1, 160, 2, 8 | packed |" in printed


@pytest.mark.slow
def test_gated_delta_rows(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--rounds", "1"]
    report, printed = report_of("gated_delta.py", arguments, tmp_path)
    rows = {(row["what"], row["size"]): row for row in report["rows"]}
    assert list(rows) == [
        *(("prefill", length) for length in (8, 32)),
        *(("train by chunks of", size) for size in (4, 8)),
        *(("step of", count) for count in (1, 4)),
    ]
    assert all(row["seconds"] > 0 for row in rows.values())
    ratio = rows["prefill", 32]["seconds"] / rows["prefill", 8]["seconds"]
    assert report["of_short"] == pytest.approx(ratio)
    assert f"32 positions take {ratio:.2f} of the time of 8" in printed


def test_experts_rows(tmp_path: Path) -> None:
    report, printed = report_of("experts.py", ["--preset", "tiny", "--rounds", "1"], tmp_path)
    rows = report["rows"]
    whats = ("mixture", "products", "one matrix")
    assert [(row["pass"], row["what"]) for row in rows] == [
        (name, what) for name in ("forward", "gradient") for what in whats
    ]
    for mixture, products, _ in (rows[:3], rows[3:]):
        ratio = mixture["seconds"] / products["seconds"]
        assert mixture["of_products"] == pytest.approx(ratio)
        assert products["of_products"] == products["least_of_products"] == 1
        # Of one round.
        assert mixture["least_of_products"] == mixture["of_products"]
        assert f"| {mixture['pass']} | mixture | {1e3 * mixture['seconds']:.2f} " in printed


def test_divergence_rows(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--repeats", "1", "--kinds", "hybrid"]
    report, printed = report_of("divergences.py", arguments, tmp_path)
    cases = [(row["gradients"], row["what"]) for row in report["rows"]]
    whats, of = ("library", "plain"), ("hidden states", "and the head")
    assert cases == [(x, what) for x in of for what in whats]
    values = [row["value"] for row in report["rows"]]
    np.testing.assert_allclose(values, values[1], rtol=1e-4)
    assert [row["of_plain"] for row in report["rows"]][1::2] == [1, 1]
    assert printed.count("| hybrid |") == 4


def test_latent_attention_rows(tmp_path: Path) -> None:
    arguments = ["--sizes", "tiny", "--rounds", "1"]
    report, printed = report_of("latent_attention.py", arguments, tmp_path)
    assert [row["variant"] for row in report["rows"]] == ["absorbed", "recomputed"]
    absorbed, recomputed = report["rows"]
    assert absorbed["of_recomputed"] == pytest.approx(absorbed["ms"] / recomputed["ms"])
    assert absorbed["largest_difference"] < 1e-5
    assert absorbed["cached_per_token"] == 6 + 2
    assert f"| 20 | absorbed | {absorbed['ms']:.2f} |" in printed


def test_few_rows_in_both_layouts(tmp_path: Path) -> None:
    arguments = ["--sizes", "tiny", "--rounds", "1"]
    report, printed = report_of("few_rows.py", arguments, tmp_path)
    rows = report["rows"]
    layouts = ("inputs first", "outputs first")
    assert [(row["rows"], row["layout"]) for row in rows] == [
        (num_rows, layout) for num_rows in (1, 2, 4, 8, 16, 32, 64) for layout in layouts
    ]
    one_row = min(row["ms"] for row in rows[:2])
    for row in rows:
        assert row["of_one_row"] == pytest.approx(row["ms"] / one_row)
        assert f"| {row['rows']} | {row['layout']} | {row['ms']:.2f} |" in printed


@pytest.mark.slow
def test_generation_rows_of_every_batch_and_number_of_drafts(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--runs", str(tmp_path / "runs")]
    report, printed = report_of("generate.py", arguments, tmp_path)
    assert report["training_seconds"]["tiny"] > 0
    rows = report["rows"]
    assert [(row["batch"], row["drafts"]) for row in rows] == [
        (batch, drafts) for batch in (1, 2) for drafts in (0, 2)
    ]
    for row in rows:
        accepted, drafts = row["accepted_per_position"], row["drafts"]
        assert len(accepted) == drafts
        # Rows may end with a draft, with no token of the main model's own after it.
        assert 1 <= row["tokens_per_pass"] <= 1 + sum(accepted) + 1e-6
        assert row["same_tokens_as_plain"] == 1
        assert row["prefill_s"] > 0
        plain = next(r for r in rows if (r["batch"], r["drafts"]) == (row["batch"], 0))
        ideal = row["tokens_per_pass"] * plain["verify_s"]
        ideal /= row["verify_s"] + drafts * row["draft_s"]
        assert row["ideal_speedup"] == pytest.approx(ideal)
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / plain["tokens_per_s"])
        assert f"| tiny | {row['batch']} | {drafts} | {row['tokens_per_s']:,.0f} " in printed


@pytest.mark.slow
def test_a_released_model_and_its_numbers(tmp_path: Path) -> None:
    """The recorded numbers of a tiny one, in the form of the large one's."""
    stored = reference("llama3")
    ids = stored["tokens"][:1, :16]
    logits = stored["logits"][0]
    top = np.argsort(-logits, axis=-1)[:, :20]
    numbers = {
        "ids0": ids,
        "top_ids0": top,
        "top_logits0": np.take_along_axis(logits, top, axis=1),
        "logsumexp0": np.log(np.exp(logits.astype(np.float64)).sum(-1)),
        "greedy0": stored["greedy"],
        "ids1": stored["prompt"],
        "top_ids1": top[:7],
        "top_logits1": np.take_along_axis(logits, top, axis=1)[:7] + 1.0,
        "logsumexp1": np.zeros(7),
        "greedy1": stored["greedy"],
    }
    numbers["ids0"], numbers["greedy0"] = ids, np.concatenate([ids, ids[:, :1]], axis=1)
    np.savez(tmp_path / "reference.npz", **numbers)
    arguments = [str(FOLDER / "llama3"), "--reference", str(tmp_path / "reference.npz")]
    report, printed = report_of(
        "released.py", [*arguments, "--rounds", "1", "--tokens", "2", "40"], tmp_path
    )
    right, wrong = report["differences"]
    assert right["top_logits"] < 1e-4
    assert right["log_sum_exp"] < 1e-4
    assert not right["greedy_equal"]
    assert wrong["top_logits"] == pytest.approx(1.0, abs=1e-3)
    assert wrong["log_sum_exp"] > 1
    assert wrong["greedy_equal"]
    sizes = sum(x.nbytes for x in tensors_of(FOLDER / "llama3").values())
    assert report["weights_bytes"] == sizes
    assert report["of_ideal"] == pytest.approx(report["ideal_ms"] / report["token_ms"])
    assert f"| {report['token_ms']:.1f} ms " in printed


@pytest.mark.slow
def test_what_a_step_moves_is_what_its_parameters_take(tmp_path: Path) -> None:
    report, printed = report_of("scaling.py", ["--preset", "tiny"], tmp_path)
    data, fsdp, expert = report["rows"]
    assert [row["mesh"] for row in report["rows"]] == [{"data": 8}, {"fsdp": 8}, {"expert": 8}]
    sizes = report["sizes"]
    embed, vocab, heads = sizes["embed"], sizes["vocab"], sizes["heads"]
    query_rank, kv_rank = sizes["q_lora_rank"], sizes["kv_lora_rank"]
    features, rotated = sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"]
    values = sizes["v_head_dim"]
    attention = embed * query_rank + query_rank * heads * (features + rotated)
    attention += embed * (kv_rank + rotated) + kv_rank * heads * (features + values)
    attention += heads * values * embed
    # The prediction depth has a layer with experts and a projection, and three norms beside it.
    sparse = sizes["expert_layers"] + 1
    layers = sizes["dense_layers"] + sparse
    one_expert = 3 * embed * sizes["expert_mlp"]
    experts, routers = sparse * sizes["experts"] * one_expert, sparse * embed * sizes["experts"]
    matrices = layers * attention + sizes["dense_layers"] * 3 * embed * sizes["mlp"]
    matrices += sparse * one_expert + 2 * embed * embed
    norms = layers * (2 * embed + query_rank + kv_rank) + (1 + 3) * embed
    biases = sparse * sizes["experts"]
    of_vocab = 2 * vocab * embed
    assert data["parameters"] == matrices + experts + routers + norms + biases + of_vocab
    # Of each float32, seven of eight parts come from elsewhere: 3.5 bytes, and 7 in an all-reduce.
    # Embedding, head and final norm are used twice, in the main model and in the depth; beside
    # gradients there are six numbers: of both a loss, its z-loss, and a count. The routers' biases
    # have no gradient.
    replicated = matrices + norms + 2 * of_vocab + embed + 6
    assert data["moved_bytes"] == only(**{"all-reduce": 7 * (replicated + experts + routers)})
    # Layers are gathered for the forward and for the backward pass, and the head once; so are
    # the token ids, so that each device finds its features in the embedding, for two lookups.
    tokens = 8 * fsdp["seq"]
    gathered = 2 * (matrices + experts + routers) + vocab * embed + 2 * tokens
    assert fsdp["moved_bytes"] == only(
        **{
            "all-gather": 3.5 * gathered,
            "reduce-scatter": 3.5 * matrices,
            "all-reduce": 7 * (replicated - matrices - of_vocab + experts + routers),
            "all-to-all": 3.5 * 4 * fsdp["seq"] * embed,
        }
    )
    # Tokens come together for the experts, forward, again, and backward; experts do not move. Each
    # token is summed over devices forward, in the depth again, and backward; so are the weights
    # of its experts, backward.
    together = sparse * tokens * embed
    sums = (2 * sparse + 1) * tokens * embed + sparse * tokens * sizes["top_k"]
    assert expert["moved_bytes"] == only(
        **{"all-gather": 3.5 * 3 * together, "all-reduce": 7 * (replicated + sums)}
    )
    assert expert["argument_bytes"] == data["argument_bytes"] - 7 / 8 * 3 * 4 * experts
    for row in report["rows"]:
        assert sum(x["times"] == sizes["expert_layers"] for x in row["transfers"]) > 5
        assert row["total_moved_bytes"] == sum(row["moved_bytes"].values())
        assert row["tokens_per_device"] == row["seq"] == 32
        assert f"| {next(iter(row['mesh']))} 8 | 32 | 32 |" in printed
    # Parameters, their two moments and a count; of each token six ids and a mask.
    assert data["argument_bytes"] == 3 * 4 * data["parameters"] + 4 + (6 * 4 + 1) * data["seq"]
    assert fsdp["argument_bytes"] < data["argument_bytes"] / 7


def only(**moved: float) -> dict[str, float]:
    """These kinds, and none of the others."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    return dict.fromkeys(kinds, 0) | moved


def test_transfers_of_each_kind_and_in_nested_loops() -> None:
    mesh = make_mesh({"data": 2, "tensor": 4})

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=P(("data", "tensor")), out_specs=P(("data", "tensor")))
    def function(x: jax.Array) -> jax.Array:
        def inner(_: int, x: jax.Array) -> jax.Array:
            return jnp.sin(lax.ppermute(x, "tensor", [(0, 1), (1, 2), (2, 3), (3, 0)]))

        def outer(_: int, x: jax.Array) -> jax.Array:
            x = lax.fori_loop(0, 5, inner, x)
            return x * lax.pcast(lax.psum(x, "data"), "data", to="varying")

        x = lax.fori_loop(0, 3, outer, x)
        x = lax.all_to_all(x, "tensor", 0, 0, tiled=True)
        x = lax.all_gather(x, "tensor", tiled=True)
        return lax.psum_scatter(jnp.cos(x), "data", tiled=True)

    _, program = compile_for(function, jnp.zeros((8 * 4, 6), jnp.float32))
    size = 4 * 6 * 4
    assert sorted(x[:3] for x in transfers(program)) == [
        ("all-gather", 3 * size, 1),
        ("all-reduce", size, 3),
        ("all-to-all", 3 * size // 4, 1),
        ("collective-permute", size, 15),
        ("reduce-scatter", 2 * size, 1),
    ]


def test_shares_of_an_accelerator_are_of_its_own_rate(tmp_path: Path) -> None:
    tables = tmp_path / "tables.md"
    arguments = ["--sizes", "tiny", "--only", "loss", "--markdown", str(tables)]
    report, printed = report_of("accelerator.py", arguments, tmp_path)
    rate = report["rows"][0]["tflops"] * 1e12
    rows = [row for row in report["rows"] if row["stage"] == "loss"]
    assert [row["what"].partition(": ")[2] for row in rows] == [
        "library",
        "recompute_logits",
        "all logits",
    ]
    for row in rows:
        # Three products of 64 tokens, 32 features and 300 ids.
        flops = 3 * 2 * 64 * 32 * 300
        assert row["share"] == pytest.approx(flops / (row["ms"] / 1e3) / rate)
        assert f"| {row['what']} | {row['compile_s']:.1f} | {row['ms']:.2f} " in printed
    assert tables.read_text().strip() == printed.strip()


@pytest.mark.slow
def test_draft_heads(tmp_path: Path) -> None:
    arguments = ["--preset", "tiny", "--starts", "random", "trunk", "--objectives", "hybrid"]
    report, printed = report_of("draft_heads.py", arguments, tmp_path)
    rows = report["rows"]
    assert [(row["start"], row["objective"], row["steps"]) for row in rows] == [
        ("jointly", "cross_entropy", 4),
        ("random", "-", 0),
        ("random", "hybrid", 3),
        ("trunk", "-", 0),
        ("trunk", "hybrid", 3),
    ]
    for row in rows:
        for kind in ("greedy", "sampled"):
            assert all(0 <= rate <= 1 for rate in row[kind])
            assert 1 <= row[f"{kind}_length"] <= 3
    assert rows[1]["sampled"] != rows[2]["sampled"]
    assert "| jointly | cross_entropy | 4 | 0 |" in printed


@pytest.mark.slow
def test_released_heads(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text("to be or not to be, " * (20 + index))
    folder = Path(__file__).parent / "data" / "checkpoints" / "qwen3"
    sizes = {"steps": 2, "batch-size": 2, "seq-len": 24, "held-out-rows": 2, "prompts": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += ["--draft-vocab", "40", "--new-tokens", "6", "--objectives", "hybrid"]
    arguments = [str(folder), "--data", str(texts), *options]
    report, printed = report_of("released_heads.py", arguments, tmp_path)
    (row,) = report["acceptance"]
    assert (row["objective"], row["tokens"]) == ("hybrid", 2 * 2 * 24)
    for kind in ("greedy", "sampled"):
        assert len(row[kind]) == 3
        assert 1 <= row[f"{kind}_length"] <= 4
    drafted = [(row["draft_vocab"], row["num_drafts"]) for row in report["decoding"]]
    vocab_size = drafted[-1][0]  # so many ids occur, if fewer than were asked for
    assert vocab_size <= 40
    assert drafted == [(vocab_size, k) for k in (1, 2, 3)]
    assert all(row["same"] == 1 for row in report["decoding"])
    assert f"| hybrid | {vocab_size} | 3 |" in printed
