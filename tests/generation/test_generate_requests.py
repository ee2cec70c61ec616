"""`peft-fast generate`: lines that are wrong get an error of their own; options that are wrong stop the command."""

import json
import shutil
from pathlib import Path

import pytest
from generate_jobs import Job, Json, save_llama, varied

from peft_fast.cli.main import main
from peft_fast.generation import settings as generate_settings
from peft_fast.generation.settings import Settings

GOOD: Json = {"input_ids": [5, 6], "adapter": "fr", "max_new_tokens": 2}
WRONG: list[tuple[Json | str | bytes, str]] = [
    ("", "the line is empty"),
    ("{broken", "not JSON: Expecting property name"),
    ("[1]", "expected a JSON object, got [1]"),
    ("null", "expected a JSON object, got None"),
    (b'{"prompt": "\xff"}', "not UTF-8: invalid start byte at byte 12"),
    ("[" * 100_000, "nested too deep"),
    ('{"prompt": "a", "prompt": "b"}', "key 'prompt' is there more than once"),
    ('{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
    ('{"prompt": "a", "id": 1e999}', "'1e999' is too large"),
    ('{"prompt": "a", "id": ' + "9" * 5000 + "}", "integer string conversion"),
    ({"prompt": "a", "tmperature": 1}, "unknown key 'tmperature'; the keys of a request are prompt, input_ids,"),
    ({"prompt": "a", "input_ids": [1]}, 'expected either "prompt" or "input_ids", got both'),
    ({"adapter": "fr"}, 'expected either "prompt" or "input_ids", got neither'),
    ({"prompt": "a", "adapter": "en"}, "unknown adapter 'en': the adapters are de, fr, it; null means the base"),
    ({"prompt": "a", "adapter": ["fr"]}, "unknown adapter ['fr']"),
    ({"prompt": ""}, '"prompt" is empty'),
    ({"prompt": 3}, '"prompt" must be a text, got 3'),
    ({"prompt": None}, '"prompt" must be a text, got None'),
    ({"prompt": "a\ud800"}, '"prompt" is not valid Unicode: surrogates not allowed at character 1'),
    ({"input_ids": []}, '"input_ids" is empty'),
    ({"input_ids": 3}, '"input_ids" must be a list of whole numbers, got 3'),
    ({"input_ids": [1, True]}, "must be a list of whole numbers"),
    ({"input_ids": [1, 2.0]}, "must be a list of whole numbers"),
    ({"input_ids": [1, 256]}, "token 256 is outside of the model's vocabulary, 0 to 255"),
    ({"input_ids": [1, -1]}, "token -1 is outside"),
    (
        {"input_ids": [1] * 59, "max_new_tokens": 6},
        "59 tokens and 6 new ones are too long for the model's 64 positions",
    ),
    ({"prompt": "a", "max_new_tokens": 0}, '"max_new_tokens" must be a whole number, 1 or more, got 0'),
    ({"prompt": "a", "max_new_tokens": True}, '"max_new_tokens" must be'),
    ({"prompt": "a", "min_new_tokens": 9, "max_new_tokens": 8}, '"min_new_tokens" 9 is more than "max_new_tokens" 8'),
    ({"prompt": "a", "do_sample": 1}, '"do_sample" must be true or false, got 1'),
    ({"prompt": "a", "do_sample": True, "temperature": 0}, '"temperature" must be a number above 0, got 0'),
    ({"prompt": "a", "do_sample": True, "temperature": "1"}, '"temperature" must be'),
    ({"prompt": "a", "do_sample": True, "top_k": -1}, '"top_k" must be'),
    ({"prompt": "a", "do_sample": True, "top_p": 1.1}, '"top_p" must be a number above 0, up to 1, got 1.1'),
    ({"prompt": "a", "do_sample": True, "min_p": -0.1}, '"min_p" must be a number from 0 to 1'),
    ({"prompt": "a", "temperature": 0.5}, '"temperature" has no effect without "do_sample": true'),
    ({"prompt": "a", "top_p": 0.5, "do_sample": False}, '"top_p" has no effect'),
    ({"prompt": "a", "length_penalty": 2.0}, '"length_penalty" has no effect without "num_beams" above 1'),
    ({"prompt": "a", "early_stopping": False, "num_beams": 1}, '"early_stopping" has no effect'),
    ({"prompt": "a", "seed": -1}, '"seed" must be a whole number'),
    ({"prompt": "a", "seed": 2**63}, '"seed" must be a whole number'),
    ({"prompt": "a", "seed": None}, '"seed" must be a whole number'),
    ({"prompt": "a", "num_beams": 0}, '"num_beams" must be'),
    ({"prompt": "a", "num_beams": 2, "do_sample": True}, "together are not supported"),
    ({"prompt": "a", "num_beams": 2, "stop": "x"}, "together are not supported"),
    ({"prompt": "a", "num_beams": 2, "num_return_sequences": 3}, 'is more than "num_beams": 2'),
    ({"prompt": "a", "num_return_sequences": 2}, "would all be the same"),
    ({"prompt": "a", "repetition_penalty": 0}, '"repetition_penalty" must be'),
    ({"prompt": "a", "no_repeat_ngram_size": 1.5}, '"no_repeat_ngram_size" must be'),
    ({"prompt": "a", "length_penalty": "long"}, '"length_penalty" must be a number'),
    ({"prompt": "a", "early_stopping": "never"}, '"early_stopping" must be'),
    ({"prompt": "a", "eos_token_id": []}, '"eos_token_id" must be a token id or a list of them'),
    ({"prompt": "a", "eos_token_id": [1, 256]}, '"eos_token_id": 256 is not a token of the model, which has 256'),
    ({"prompt": "a", "stop": ["x", ""]}, '"stop" must be a text or a list of texts, none empty'),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("generate"))


@pytest.fixture
def job(saved: Path, tmp_path: Path) -> Job:
    return Job(saved, tmp_path)


def test_lines_that_are_wrong_say_so_and_the_others_go_on(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong and good lines in turn; nothing of a wrong one reaches the model, and each names what is wrong."""
    lines: list[Json | str | bytes] = [GOOD]
    for wrong, _ in WRONG:
        lines += [wrong, GOOD]
    job.write(*lines)
    assert job.run("--max-new-tokens", "8") == 1
    results = job.results()
    assert [r["index"] for r in results] == list(range(2 * len(WRONG) + 1))
    for result, (line, words) in zip(results[1::2], WRONG, strict=True):
        assert set(result) == {"index", "error"} and words in result["error"], line
        assert len(result["error"]) < 400
    assert {json.dumps(r["output_ids"]) for r in results[::2]} == {json.dumps(results[0]["output_ids"])}
    assert f"{len(WRONG)} of {2 * len(WRONG) + 1} requests got no answer" in capsys.readouterr().err


def test_limits_that_just_hold(job: Job) -> None:
    """The neighbours of what is refused, on the other side of the limit."""
    good: list[Json] = [
        {"input_ids": [1] * 58, "max_new_tokens": 6},
        {"input_ids": [0, 255], "max_new_tokens": 1, "min_new_tokens": 1},
        {**GOOD, "do_sample": True, "top_p": 1, "top_k": 0, "min_p": 0, "temperature": 0.01, "seed": 2**63 - 1},
        {**GOOD, "num_beams": 3, "num_return_sequences": 3, "length_penalty": -1, "early_stopping": True},
        {**GOOD, "eos_token_id": 255, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "stop": ["x"]},
        {**GOOD, "adapter": None, "seed": 3},
    ]
    job.write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", *good, {**GOOD, "id": "\ud800"})
    job.requests.write_bytes(job.requests.read_bytes()[:-1])  # no line end after the last
    assert job.run() == 0
    assert len(job.results()) == len(good) + 2 and job.results()[-1]["id"] == "\ud800"


def test_an_error_keeps_the_id(job: Job) -> None:
    wrong, broken = job.answers({"id": "x7", "prompt": ""}, {"id": [1], "adapter": "en", "prompt": "a"})
    assert wrong["id"] == "x7" and broken["id"] == [1] and "error" in broken


def test_settings_of_the_model(saved: Path) -> None:
    """What generation_config.json says holds where a request says nothing."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, temperature=0.5, eos_token_id=[3, 4], num_return_sequences=2, max_length=9
    )
    settings = generate_settings.from_model(config)
    assert settings == Settings(do_sample=True, temperature=0.5, eos_token_id=(3, 4))
    assert generate_settings.apply({"top_p": 0.5}, settings, 10).top_p == 0.5
    assert generate_settings.apply({"do_sample": False}, settings, 10).temperature == 0.5


# ------------------------------------------------------------------------------------------------ options
def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("peft-fast"), lines
    return lines[0]


def test_options_that_cannot_be_used(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write(GOOD)
    base, adapters = str(job.saved / "base"), job.saved / "adapters"
    (tmp_path / "empty").mkdir()
    fr, requests = str(adapters / "fr"), ["--in", str(job.requests), "--out", str(job.out)]
    for arguments, words in [
        (["--model", str(tmp_path), *requests], "expected the directory of a model"),
        (
            ["--model", base, "--in", "nothing.jsonl", "--out", str(job.out)],
            "--in nothing.jsonl: there is no such file",
        ),
        (["--model", base, "--in", str(job.requests), "--out", str(job.requests)], "this is the file of the requests"),
        (["--model", base, "--in", str(job.requests), "--out", str(tmp_path / "no" / "x")], "there is no directory"),
        (["--model", base, "--in", str(job.requests), "--out", str(tmp_path)], "it is a directory"),
        (["--model", base, *requests, "--adapters", fr], "expected NAME=DIR"),
        (["--model", base, *requests, "--adapters", "fr="], "expected NAME=DIR"),
        (["--model", base, *requests, "--adapters", "fr=nowhere"], "there is no adapter in nowhere"),
        (["--model", base, *requests, "--adapters", f"fr={base}"], "there is no adapter in"),
        (["--model", base, *requests, "--adapters", f"fr={fr}", f"fr={fr}"], "two adapters have the name 'fr'"),
        (["--model", base, *requests, "--adapters", f"a.b={fr}"], "it contains '.'"),
        (["--model", base, *requests, "--adapters", f"={fr}"], "it is empty"),
        (["--model", base, *requests, "--adapters", f"__base__={fr}"], "means the model without an adapter"),
        (["--model", base, *requests, "--adapters-dir", "nowhere"], "there is no such directory"),
        (["--model", base, *requests, "--adapters-dir", str(tmp_path)], "none is there"),
        (["--model", base, *requests, "--adapters-dir", fr], f"it is one itself: --adapters NAME={fr}"),
        (["--model", base, *requests, "--device", "abacus"], "--device abacus"),
    ]:
        assert main(["generate", *arguments]) == 2, arguments
        assert words in one_error(capsys)
    assert not job.out.exists()
    same = ["--adapters", f"de={fr}"]
    assert job.run(*same) == 2 and "two adapters have the name 'de'" in one_error(capsys)
    for settings, words in [
        ("{", "not JSON"), ('{"seed": 1}', "unknown setting 'seed'"), ('{"top_k": 3}', "no effect"), ("3", "object"),
    ]:  # fmt: skip
        assert job.run("--settings", settings) == 2 and words in one_error(capsys)
    assert job.run() == 0, "nothing that was refused is in the way"


@pytest.mark.parametrize("option", [["--batch-size", "0"], ["--max-new-tokens", "x"], ["--dtype", "int8"], ["--modle"]])
def test_options_that_the_parser_refuses(option: list[str], job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.run(*option)
    assert stopped.value.code == 2 and option[0] in one_error(capsys)


def test_adapters_by_name_and_by_directory(job: Job, tmp_path: Path) -> None:
    request = varied(5)[1]
    whole = job.answers({**request, "adapter": "it"})[0]
    job.saved = Path(shutil.copytree(job.saved, tmp_path / "saved"))
    (job.saved / "adapters" / "notes").mkdir()
    (job.saved / "adapters" / "file.txt").write_text("not an adapter")
    more = ["--adapters", f"x={job.saved / 'adapters' / 'it'}", "--adapters", f"y={job.saved / 'adapters' / 'fr'}"]
    results = job.answers(*({**request, "adapter": name} for name in ("it", "x", "y", "fr", "notes")), more=more)
    assert results[0]["output_ids"] == results[1]["output_ids"] == whole["output_ids"]
    assert results[2]["output_ids"] == results[3]["output_ids"] != results[0]["output_ids"]
    assert "the adapters are x, y, de, fr, it" in results[4]["error"]


@pytest.mark.parametrize("broken", ["weights", "config", "missing tensor"])
def test_a_broken_adapter_is_named_before_anything_runs(
    broken: str, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    job.saved = Path(shutil.copytree(job.saved, tmp_path / "saved"))
    directory = job.saved / "adapters" / "it"
    weights = directory / "adapter_model.safetensors"
    if broken == "weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif broken == "config":
        (directory / "adapter_config.json").write_text("{")
    else:
        save_file(dict(list(load_file(weights).items())[1:]), weights)
    job.write(GOOD)
    assert job.run() == 1
    assert f"adapter it, {directory}: " in one_error(capsys)
    assert job.results() == []


def test_a_broken_model_is_named(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    job.write(GOOD)
    assert main(["generate", "--model", str(tmp_path / "base"), "--in", str(job.requests), "--out", str(job.out)]) == 1
    assert f"--model {tmp_path / 'base'}: " in one_error(capsys)
