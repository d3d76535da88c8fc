"""Text from a checkpoint: the `generate` command, and the comparison that ends a run."""

import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equinox_mtp.__main__ import main
from equinox_mtp.speculative import StreamedStep, generate
from equinox_mtp.training import (
    TEXT_END,
    CheckpointInfo,
    Corpus,
    GenerateConfig,
    TrainConfig,
    compare,
    generate_text,
    held_out_prompts,
    load_model,
    train,
)
from equinox_mtp.training._checkpoint import load_info, save_checkpoint
from equinox_mtp.training._checkpoint_files import last_checkpoint
from equinox_mtp.training._screen import Counts, marked_text

PROMPT = "def f(x):\n"
NEW = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on a little text that ends with a comparison, and what it printed."""
    folder = tmp_path_factory.mktemp("text_run")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.choice(["def f(x):\n", "    return x\n", "import jax\n", "y = 1\n"], 12)
        (folder / "text" / f"{i:02d}.py").write_text("".join(words))
    config = TrainConfig(
        data=(folder / "text",),
        out=folder / "run",
        embed_size=32,
        num_layers=1,
        num_heads=2,
        mlp_size=64,
        seq_len=32,
        batch_size=8,
        steps=40,
        warmup_steps=4,
        eval_every=40,
        eval_rows=4,
        checkpoint_every=40,
        compare_prompts=2,
    )
    with pytest.MonkeyPatch.context() as patched:
        printed = io.StringIO()
        patched.setattr("sys.stdout", printed)
        train(config)
    return folder / "run", printed.getvalue()


def expected_text(folder: Path, num_drafts: int, new: int = NEW) -> tuple[bytes, Any]:
    """The continuation by `generate`, and its counters."""
    model, _ = load_model(folder)
    prompt = np.frombuffer(PROMPT.encode(), np.uint8).astype(np.int32)[None]
    generation = generate(model, prompt, max_new_tokens=new, num_drafts=num_drafts, eos_id=TEXT_END)
    ids = generation.tokens[0, prompt.shape[1] : int(generation.lengths[0])]
    return bytes(int(x) for x in ids if x != TEXT_END), generation


def test_training_ends_with_a_comparison(run: tuple[Path, str]) -> None:
    _, printed = run
    assert "held-out prompts continued greedily\n" in printed
    assert re.search(r"\n  [\d,]+ tokens/s plain, [\d,]+ with 1 draft\(s\) per step", printed)
    line = re.search(
        r"\n  ([\d,]+) tokens/s plain, ([\d,]+) with 2 "
        r"draft\(s\) per step: ([\d.]+) times as fast, 100% of the continuations equal\n"
        r"    ([\d.]+) tokens per forward pass; accepted: first draft (\d+)%, first 2 (\d+)%\n",
        printed,
    )
    assert line is not None, printed
    plain, drafted = (int(x.replace(",", "")) for x in line.groups()[:2])
    assert float(line[3]) == pytest.approx(drafted / plain, abs=0.02)
    # Less where a row ends with a draft.
    most = 1 + (int(line[5]) + int(line[6])) / 100
    assert most - 0.1 < float(line[4]) < most + 0.02


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_text_is_streamed_with_marks(
    run: tuple[Path, str], num_drafts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    generate_text(GenerateConfig(PROMPT, folder, drafts=num_drafts, max_new_tokens=NEW))
    printed = capsys.readouterr().out
    text, generation = expected_text(folder, num_drafts)
    body, _, counts = printed.rpartition("\n\n")
    assert re.sub("[⟦⟧]", "", body).encode() == PROMPT.encode() + text
    marked = "".join(re.findall("⟦(.*?)⟧", body, flags=re.DOTALL))
    steps, accepted = int(generation.num_steps[0]), generation.num_accepted[0]
    assert len(marked) == int(accepted.sum())
    assert (len(marked) > 0) == (num_drafts > 0)
    assert counts.startswith(
        f"{int(generation.num_generated[0])} tokens in {1 + steps} forward passes; not "
        "counting the prompt's, "
        f"{float(generation.tokens_per_pass):.2f} tokens per forward pass"
    )
    for rate in generation.accepted_per_position.tolist():
        assert f" {rate:.0%}" in counts


def test_long_texts_are_warned_of_and_compared(
    run: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    generate_text(GenerateConfig(PROMPT, folder, max_new_tokens=30, compare=True))
    printed = capsys.readouterr().out
    assert printed.startswith(
        "note: up to 40 tokens are asked for; the model was trained on rows of 32"
    )
    assert re.search(r"greedily: [\d,]+ tokens/s plain, [\d,]+ with 2 draft\(s\)", printed)


def test_command(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    checkpoint = last_checkpoint(folder / "checkpoints")
    options = ["--prompt", PROMPT, "--drafts", "1", "--max-new-tokens", "3", "--temperature", "1"]
    printed = []
    for path in (folder, checkpoint, folder / "checkpoints"):
        assert main(["generate", "--checkpoint", str(path), *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith(PROMPT)
    assert "3 tokens in" in printed[0]
    assert printed[0] == printed[1] == printed[2]


def test_errors(run: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    info = load_info(last_checkpoint(folder / "checkpoints"))
    save_checkpoint(
        tmp_path / "of_ids", {"w": jnp.zeros(1)}, CheckpointInfo(1, 8, "hash", info.config)
    )
    cases = [
        (tmp_path, PROMPT, [], "`checkpoint`: there is none in"),
        (tmp_path / "of_ids", PROMPT, [], "`checkpoint` must be of a model of text"),
        (folder, "", [], "`prompt` must hold at least one character"),
        (folder, PROMPT, ["--drafts", "-1"], "`drafts` must be at least 0"),
        (folder, PROMPT, ["--drafts", str(10**6)], "`drafts` must be at least 0 and at most"),
        (folder, PROMPT, ["--temperature", "-1"], "`temperature` must be at least 0"),
        (folder, PROMPT, ["--temperature", "nan"], "`temperature` must be finite"),
        (folder, PROMPT, ["--seed", str(2**70)], "`seed` must lie in 0 … 4294967295; got 118"),
        (folder, PROMPT, ["--seed", "-1"], "`seed` must lie in 0 … 4294967295; got -1"),
        (folder, PROMPT, ["--max-new-tokens", str(10**12)], "`max_new_tokens` must be at least 1"),
        (folder, "\ud800", [], "`prompt` must be text"),
        (folder, PROMPT, ["--max-new-tokens", "0"], "`max_new_tokens` must be at least 1"),
    ]
    for path, prompt, options, message in cases:
        assert main(["generate", "--checkpoint", str(path), "--prompt", prompt, *options]) == 1
        assert f"error: {message}" in capsys.readouterr().err


def test_marks_keep_characters_of_several_bytes_whole() -> None:
    ids = [*"aé".encode(), TEXT_END]
    first = StreamedStep(np.asarray([ids[:2]]), np.asarray([2]), np.asarray([1]))
    second = StreamedStep(np.asarray([ids[2:]]), np.asarray([2]), np.asarray([1]))
    assert list(marked_text([first, second], "<", ">")) == ["<a>", "<é>"]


@pytest.mark.parametrize("ends", [(), (TEXT_END,)])
def test_a_character_cut_at_the_end_is_shown(ends: tuple[int, ...]) -> None:
    ids = [*"a中".encode()[:-1], *ends]
    step = StreamedStep(np.asarray([ids]), np.asarray([len(ids)]), np.asarray([2]))
    assert "".join(marked_text([step], "<", ">")) == "<a>\ufffd"


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def printed_on(
    monkeypatch: pytest.MonkeyPatch, out: io.TextIOWrapper, folder: Path, prompt: str, new: bytes
) -> str:
    """What the command writes if the model continues by these bytes."""

    def steps(*_: Any, **__: Any) -> Any:
        ids = list(new)
        yield StreamedStep(np.asarray([ids[:1]]), np.asarray([1]), np.asarray([0]))
        rest, count = np.asarray([ids[1:]]), np.asarray([len(ids) - 1])
        yield StreamedStep(rest, count, count)

    monkeypatch.setattr("equinox_mtp.training._generate.stream", steps)
    monkeypatch.setattr("sys.stdout", out)
    generate_text(GenerateConfig(prompt, folder, max_new_tokens=NEW))
    written = out.buffer
    assert isinstance(written, io.BytesIO)
    return written.getvalue().decode(out.encoding)


@pytest.mark.parametrize("colored", [False, True])
def test_escape_sequences_are_shown_on_a_terminal(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, colored: bool
) -> None:
    if colored:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", "1")
    begin, end = ("\033[30;102m", "\033[0m") if colored else "⟦⟧"
    prompt, new = "é\x1b[2J\r\t\u0090\u202e", b"\nz\x1b]0;title\x07" + "中\x7f\0".encode()
    out = Terminal(io.BytesIO(), encoding="utf8", newline="")
    printed = printed_on(monkeypatch, out, run[0], prompt, new)
    expected = "é\\x1b[2J\\x0d\t\\x90\\u202e\n" + begin + "z\\x1b]0;title\\x07中\\x7f\\x00" + end
    assert printed.startswith(expected + "\n\n")


def test_a_pipe_gets_the_text_as_it_is(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, new = "é\x1b[2J", b"y\x1b]0;t\x07" + "中".encode()
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf8", newline="")
    printed = printed_on(monkeypatch, out, run[0], prompt, new)
    assert printed.startswith("é\x1b[2Jy⟦\x1b]0;t\x07中⟧\n\n")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("cp1252", "é\\u4e2d\\ufffdy[[\\u6587]]"), ("ascii", "\\xe9\\u4e2d\\ufffdy[[\\u6587]]")],
)
def test_an_encoding_that_lacks_characters_shows_them_escaped(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    # The last one is a byte of the command line that is no UTF-8.
    printed = printed_on(monkeypatch, out, run[0], "é中\udcff", "y文".encode())
    assert printed.startswith(expected + "\n\n")


def test_too_little_memory_is_one_line(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr("equinox_mtp.training._generate.stream", steps)
    options = ["--checkpoint", str(run[0]), "--prompt", PROMPT, "--max-new-tokens", "99"]
    assert main(["generate", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is not enough memory for a prompt of 10 tokens and 99 ")
    assert error.count("\n") == 1


def test_counts_of_the_command_are_of_what_was_committed() -> None:
    """Five drafts, of which the third is the last token of the row."""
    counts = Counts()
    ids = np.asarray([[7, 7, TEXT_END, 7, 7, 7]])
    steps = [
        StreamedStep(ids, np.asarray([1]), np.asarray([0])),
        StreamedStep(ids, np.asarray([3]), np.asarray([3])),
    ]
    assert list(counts.of(steps)) == steps
    assert str(counts) == (
        "4 tokens in 2 forward passes; not counting the prompt's, 3.00 tokens per forward pass; "
        "accepted: first draft 100%, first 2 100%, first 3 100%, first 4 0%, first 5 0%"
    )
    alone = Counts()
    assert list(alone.of(steps[:1])) == steps[:1]
    assert str(alone) == "1 tokens in 1 forward passes"


def test_comparison_counts_what_generate_counts(run: tuple[Path, str]) -> None:
    model, _ = load_model(run[0])
    prompts = [np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)]
    drafts: dict[str, Any] = {"num_drafts": 3, "draft_vocab": np.arange(64)}
    comparison = compare(model, prompts, max_new_tokens=6, rounds=1, **drafts)
    together = generate(model, np.stack(prompts), max_new_tokens=6, **drafts)
    assert comparison.num_tokens == 12
    assert comparison.same_tokens == 1
    assert comparison.speedup == comparison.plain_seconds / comparison.seconds > 0
    np.testing.assert_allclose(
        comparison.accepted_per_position, together.accepted_per_position, rtol=1e-6
    )
    assert comparison.tokens_per_pass == pytest.approx(float(together.tokens_per_pass))


def test_prompts_are_the_beginnings_of_long_documents() -> None:
    documents = [np.arange(n, dtype=np.int32) for n in (3, 9, 4, 5, 7)]
    prompts = held_out_prompts(Corpus.of_documents(documents, 10), num_prompts=2, length=4)
    assert jax.tree.map(list, prompts) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert len(held_out_prompts(Corpus.of_documents(documents, 10), num_prompts=9, length=4)) == 3
