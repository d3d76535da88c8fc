"""Text as tokens: released models and runs of one's own, from the commands."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from checkpoints import FOLDER, changed
from hypothesis import given, strategies as st
from tokenizers import decoders

from equinox_mtp import pretrained, speculative
from equinox_mtp.__main__ import main
from equinox_mtp.training import load_corpus
from equinox_mtp.training._text import ByteText, TokenizerText, end_tokens, read_text

SAMPLES = [*json.loads((FOLDER / "qwen3" / "tokenizer_samples.json").read_text())]


@pytest.mark.parametrize("split", [1, 2, 5])
def test_text_of_ids_that_come_a_few_at_a_time(split: int) -> None:
    text = read_text(FOLDER / "qwen3")
    for sample in SAMPLES:
        ids = text.encode(sample["text"]).tolist()
        assert ids == sample["ids"]
        decoder = text.decoder()
        parts = [decoder.feed(ids[i : i + split]) for i in range(0, len(ids), split)]
        assert "".join(parts) + decoder.finish() == sample["text"]
        assert "\ufffd" not in "".join(parts)


PIECES = (
    *("the", "▁the", "▁", "##s", "s", " ", "  ", ".", " .", "n't", " do not", "é", "\ufffd", "b"),
    *("<0x41>", "<0xE2>", "<0x82>", "<0xAC>", "<0xF0>", "a</w>", "|", "<pad>", "<s>"),
)
TELLING = [PIECES.index(piece) for piece in ("s", " ", ".", "<0x41>", "<0xE2>", "<s>")]
DECODERS = {
    "none": None,
    "word-piece": decoders.WordPiece(),
    "metaspace": decoders.Metaspace(),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "strip": decoders.Strip(" ", 1, 0),
    "strip-end": decoders.Strip(" ", 0, 1),
    "bytes": decoders.ByteFallback(),
    "byte-level": decoders.ByteLevel(),
    # As Llama 2 has it.
    "sentence-piece": decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "strip-whole": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "rewriting": decoders.Sequence([decoders.Fuse(), decoders.Replace(" .", ".")]),
    "rewriting-all": decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(tokenizers.Regex("^.*b$"), "!")]
    ),
}


def text_of_pieces(name: str) -> TokenizerText:
    model = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, PIECES[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = DECODERS[name]
    tokenizer.add_special_tokens(["<s>"])
    return TokenizerText(tokenizer, [PIECES.index("b")] if name == "none" else [])


@pytest.mark.parametrize("name", [*DECODERS, "file qwen3", "file llama3"])
@given(data=st.data())
def test_parts_are_the_text_of_all_ids(name: str, data: Any) -> None:
    """However a decoder writes tokens, and whichever come: ids that are no text, too."""
    text = TEXTS.get(name) or text_of_pieces(name)
    ids = st.sampled_from(TELLING) | st.integers(0, text.vocab_size - 1)
    batches = data.draw(st.lists(st.lists(ids, max_size=3), max_size=8))
    decoder = text.decoder()
    parts = [*(decoder.feed(ids) for ids in batches), decoder.finish()]
    ids = [x for ids in batches for x in ids if x not in text.end_ids]
    assert "".join(parts) == (text._tokenizer.decode(ids) if ids else "")


TEXTS = {f"file {name}": read_text(FOLDER / name) for name in ("qwen3", "llama3")}


@pytest.mark.parametrize(
    ("name", "pieces", "expected"),
    [
        ("metaspace", ["▁the", "s", "<0xE2>", "▁the"], ["the", "s", "<0xE2>", " the", ""]),
        (
            "sentence-piece",
            ["▁the", "<0xE2>", "<0x82>", "<s>", "<0xAC>", "s", "<0x41>", "<0xE2>"],
            ["the", "", "", "", "", "€s", "", "", "\ufffd\ufffd"],
        ),
        ("rewriting", ["the", " ", ".", "s"], ["", "", "", "", "the.s"]),
    ],
)
def test_text_is_given_out_once_nothing_can_change_it(
    name: str, pieces: list[str], expected: list[str]
) -> None:
    decoder = text_of_pieces(name).decoder()
    parts = [decoder.feed([PIECES.index(piece)]) for piece in pieces]
    assert [*parts, decoder.finish()] == expected


def test_padding_and_truncation_of_a_file_are_for_batches(tmp_path: Path) -> None:
    tokenizer = pretrained.load(FOLDER / "qwen3")[1]
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the dog and the fox, to be or not to be"
    assert len(read_text(FOLDER / "qwen3").encode(text)) > 12
    for one in (FOLDER / "qwen3", tmp_path):
        np.testing.assert_array_equal(
            read_text(one).encode(text), read_text(FOLDER / "qwen3").encode(text)
        )


def test_a_character_that_is_cut() -> None:
    text = read_text(FOLDER / "qwen3")
    ids = text.encode("我").tolist()
    assert len(ids) > 1
    for one, last in ((text, ids[:-1]), (ByteText(), [0xE6, 0x88])):
        decoder = one.decoder()
        assert decoder.feed(last) == ""
        assert set(decoder.finish()) == {"\ufffd"}


def test_ids_that_are_no_bytes_say_nothing() -> None:
    """A model of a configuration may have a larger vocabulary than the bytes."""
    decoder = ByteText().decoder()
    assert decoder.feed([97, 256, 300, 151_935, 98]) == "ab"
    assert decoder.finish() == ""


def test_which_token_ends_a_text(tmp_path: Path) -> None:
    tokenizer = pretrained.load(FOLDER / "qwen3")[1]
    assert end_tokens(tokenizer, tmp_path) == (0,)
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert end_tokens(words, tmp_path) == ()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "the"}}')
    assert end_tokens(tokenizer, tmp_path) == (tokenizer.token_to_id("the"),)
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    assert end_tokens(tokenizer, tmp_path) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert end_tokens(tokenizer, tmp_path) == (9, 8)


@pytest.mark.slow
def test_generate_continues_with_a_released_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "to be or not"
    folder = str(FOLDER / "fastmtp")
    options = ["--prompt", prompt, "--max-new-tokens", "8", "--drafts", "2", "--compare"]
    assert main(["generate", "--model", folder, *options]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = pretrained.load(folder)
    ids = tokenizer.encode(prompt).ids
    generation = speculative.generate(model, [ids], max_new_tokens=8)
    expected = tokenizer.decode(generation.tokens[0].tolist())
    assert re.sub("[⟦⟧]", "", printed.split("\n\n8 tokens in ")[0]) == expected
    assert re.search(r"8 tokens in \d+ forward passes; not counting the prompt's", printed)
    assert "100% of the continuations equal" in printed


@pytest.mark.slow
def test_a_heads_model_says_what_ends_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any of several tokens, of the model's folder, and its longest row; not the head's."""
    prompt, folder = "to be or not", FOLDER / "fastmtp"
    model, tokenizer = pretrained.load(folder)
    ids = tokenizer.encode(prompt).ids
    tokens = speculative.generate(model, [ids], max_new_tokens=12).tokens[0].tolist()
    # Of these the second one comes first.
    ends = [tokens[len(ids) + 8], tokens[len(ids) + 6]]
    stop = next(i for i in range(len(ids), len(tokens)) if tokens[i] in ends)
    assert len(ids) < stop < len(tokens) - 3
    # The third one is beyond the vocabulary: the model has no logits of it.
    sizes = {"eos_token_id": [*ends, 10**6], "max_position_embeddings": 16}
    changed("qwen3", tmp_path / "qwen3", config=lambda c: c.update(sizes))
    head = changed("fastmtp", tmp_path / "head")
    (head / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[len(ids)]}))
    assert pretrained.model_folder(head) == tmp_path / "qwen3"
    options = ["--prompt", prompt, "--max-new-tokens", "12", "--drafts", "2"]
    assert main(["generate", "--model", str(head), *options]) == 0
    printed = capsys.readouterr().out
    note = f"note: up to {len(ids) + 12} tokens are asked for; the model was trained on rows of 16"
    assert printed.startswith(note)
    _, text, counts = printed.split("\n\n")
    assert re.sub("[⟦⟧]", "", text) == tokenizer.decode(tokens[:stop])
    assert counts.startswith(f"{stop + 1 - len(ids)} tokens in ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "`checkpoint` or `model` must be given"),
        (["--model", "x", "--checkpoint", "y"], "`checkpoint` or `model` must be given"),
        (["--model", str(FOLDER / "mimo")], "has no tokenizer.json"),
        (["--model", "no/such/folder"], "`folder`: there is no folder no/such/folder"),
    ],
)
def test_models_that_cannot_be_opened(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", "x", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_run_on_the_tokens_of_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text("the dog and the fox, to be or not to be. " * 20)
    folder = changed("qwen3", tmp_path / "model", config=lambda c: c.update(eos_token_id=3))
    small = {"embed-size": 16, "num-layers": 1, "num-heads": 2, "mlp-size": 16, "depths": 1}
    sizes = {"steps": 2, "batch-size": 2, "seq-len": 16, "eval-rows": 2, "compare-prompts": 0}
    options = [f"--{name}={value}" for name, value in {**small, **sizes}.items()]
    out = tmp_path / "run"
    train = ["train", "--data", str(texts), "--tokenizer", str(folder), "--out", str(out)]
    assert main([*train, *options]) == 0
    corpus = load_corpus([texts], text=read_text(folder))
    assert len(corpus) == 6
    assert corpus.vocab_size == 300
    ids = read_text(folder).encode((texts / "0.txt").read_text())
    np.testing.assert_array_equal(corpus[0], [*ids, 3])
    assert json.loads((out / "config.json").read_text())["end_of_document"] == 3
    capsys.readouterr()
    generate = ["generate", "--checkpoint", str(out), "--prompt", "the dog"]
    assert main([*generate, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the dog")
    (folder / "tokenizer.json").unlink()  # the run has its own
    assert main([*generate, "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "no-such"], "`tokenizer`: there is no file no-such"),
        (["--tokenizer", str(FOLDER / "mimo")], "`tokenizer`: there is no file"),
        (["--tokenizer", "{words}"], "`end_of_document` must be given"),
        (
            ["--tokenizer", str(FOLDER / "qwen3"), "--vocab-size", "9"],
            "`vocab_size` is the tokenizer's, 300; got 9",
        ),
        (
            ["--tokenizer", str(FOLDER / "qwen3"), "--end-of-document", "1", "--data", "{ids}"],
            "`data` must hold text for a tokenizer",
        ),
    ],
)
def test_tokenizers_that_do_not_fit(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", np.arange(9))
    (tmp_path / "text.txt").write_text("the dog")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(tmp_path / "words.json"))
    names = {"ids": tmp_path / "ids.npy", "words": tmp_path / "words.json"}
    options = [option.format(**names) for option in options]
    data = [] if "--data" in options else ["--data", str(tmp_path / "text.txt")]
    assert main(["train", *data, *options, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
