"""`peft-fast train` on chats: the tokenizer's template, a loss on the answers only; and tables in other formats."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from train_jobs import Job, mean_loss, save_llama
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_fast.training import model as train_model
from peft_fast.training.chat import tokens_and_learned

TURN = "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}"
PLAIN = "<s>" + LOOP + TURN + "{% endfor %}" + ASK
# as Qwen3's: only the last answer has a thought, if an empty one
THINKS_LAST = (
    "<s>" + LOOP + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}" + ASK
)
# as DeepSeek's: asks with the begin of a thought, and leaves it out of the answers
ASKS_TO_THINK = PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
MARKED = (
    "<s>" + LOOP + "{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "{% endgeneration %}<|im_end|>\n{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "größer?"},
    {"role": "assistant", "content": "größer"},
    {"role": "user", "content": "Set a flag"},
    {"role": "assistant", "content": "größer"},
]
OTHER = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]


def save_chat_model(directory: Path, template: str | None = PLAIN) -> Path:
    """A Llama with a tokenizer whose tokens are bytes, and a few marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=["<|im_start|>"], **marks)
    fast.chat_template = template
    fast.save_pretrained(directory)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=fast.bos_token_id,
            eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        )
    ).save_pretrained(directory)  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def learned(directory: Path, template: str, messages: Any = CHAT) -> tuple[list[str], str]:
    """(the stretches that are learned, all of it)."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokens, marks = tokens_and_learned(tokenizer, messages, None)
    assert tokens == tokenizer.apply_chat_template(messages, return_dict=False)
    parts: list[list[int]] = []
    for token, mark, before in zip(tokens, marks, [False, *marks], strict=False):
        if mark:
            parts = parts if before else [*parts, []]
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts], tokenizer.decode(tokens)


def test_answers_are_learned_with_their_end(model: Path) -> None:
    end = "<|im_end|>\n"
    assert learned(model, PLAIN)[0] == ["größer" + end] * 2
    assert learned(model, THINKS_LAST)[0] == ["größer" + end, "<think>\n\n</think>\n\ngrößer" + end]
    assert learned(model, MARKED)[0] == ["größer"] * 2, "what the template marks"
    assert learned(model, ASKS_TO_THINK)[0] == ["<|im_start|>assistant\ngrößer" + end] * 2
    assert learned(model, PLAIN, [*CHAT[:-1], {"role": "assistant", "content": " x "}])[0] == [
        "größer" + end,
        "x" + end,
    ]


def test_an_answer_that_the_template_hides_is_refused(model: Path) -> None:
    hides = THINKS_LAST.replace("{{ m.content | trim }}", "{{ m.content if loop.last else '...' }}")
    with pytest.raises(ValueError, match="message 3 is not found in what the template makes"):
        learned(model, hides)


def test_loss_is_that_of_the_answers(model: Path, tmp_path: Path) -> None:
    job = Job(model, tmp_path)
    job.write([{"messages": CHAT}, {"messages": OTHER, "source": "is not read"}])
    more = ("--batch-size", "2", "--max-steps", "12", "--lr", "0.02", "--lora-dropout", "0", "--eval-data")
    assert job.run(*more, str(job.data)) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)

    def row(text: str) -> list[int]:
        tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    first = "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ngrößer?<|im_end|>\n<|im_start|>assistant\n"
    second = first + "größer<|im_end|>\n<|im_start|>user\nSet a flag<|im_end|>\n<|im_start|>assistant\n"
    other = "<s><|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"
    rows = [(row(first), row("größer<|im_end|>\n")), (row(second), row("größer<|im_end|>\n"))]
    expected = mean_loss(LlamaForCausalLM.from_pretrained(model), [*rows, (row(other), row("c d<|im_end|>\n"))])
    assert job.losses()[0] == pytest.approx(expected, rel=1e-5)
    evaluations = job.results()["evaluations"]
    assert evaluations[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluations[-1]["eval_loss"] < expected - 0.3


def test_a_long_chat_loses_its_begin(model: Path, tmp_path: Path) -> None:
    job = Job(model, tmp_path)
    job.write([{"messages": CHAT}])
    assert job.run("--max-steps", "1", "--max-length", "20") == 0
    assert job.results()["rows_cut"] == 1


# ------------------------------------------------------------------------------------------------ refused
@pytest.fixture
def job(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job that must not come as far as reading weights."""
    monkeypatch.setattr(train_model, "build", lambda *_: pytest.fail("weights are read"))
    return Job(model, tmp_path)


def refused(job: Job, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    capsys.readouterr()
    assert job.run(*more) == 2 and not job.out.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "\"messages\" is 'hello'; expected a list of"),
        ([], '"messages" is []; expected a list of'),
        ([*OTHER, {"from": "gpt"}], "message 3 is {'from': 'gpt'}; expected a list of"),
        ([OTHER[0]], "the last message is of the role 'user'; expected"),
        ([{"role": "assistant", "content": ["x"]}], "\"content\" of message 1 must be a text, got ['x']"),
        ([{"role": "assistant", "content": None}], '"content" of message 1 must be a text, got None'),
    ],
)
def test_messages_that_are_wrong(messages: Any, said: str, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([{"messages": OTHER}, {"messages": messages}])
    assert f"{job.data}, line 2: {said}" in refused(job, capsys)


def test_templates_that_are_wrong(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write([{"messages": OTHER}, {"messages": CHAT}])
    job.model = save_chat_model(tmp_path / "none", None)
    assert 'for "messages" the tokenizer has no chat template' in refused(job, capsys)
    job.model = save_llama(tmp_path / "bytes")
    assert "the tokenizer has no chat template" in refused(job, capsys)
    raises = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
    job.model = save_chat_model(tmp_path / "raises", raises)
    assert "line 2: the tokenizer's chat template cannot be used: no system" in refused(
        job, capsys, "--eval-split", "0"
    )
    job.model = save_chat_model(tmp_path / "marks", MARKED)
    job.write([{"messages": [OTHER[0], {"role": "assistant", "content": ""}]}])
    assert "line 1: the tokenizer's chat template marks no answer in its last 256" in refused(job, capsys)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.csv", b"text,label\nx,1\n", "a file in CSV format; expected one JSON object on each line"),
        ("data.tsv", b"text\tlabel\nx\t1\n", "read_csv("),
        ("data.parquet", b"PAR1\x15\x04", "read_parquet("),
        ("data", b"PAR1\x15\x04", "a file in Parquet format"),
        ("data.json", b'[\n {"text": "x"}\n]', "read_json("),
        ("data.jsonl.gz", b"\x1f\x8b\x08", "gunzip it first"),
    ],
)
def test_tables_in_other_formats(
    name: str, content: bytes, said: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.data = job.data.with_name(name)
    job.data.write_bytes(content)
    assert said in refused(job, capsys)


def test_the_line_that_converts_a_table(job: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    job.data = tmp_path / "data.tsv"
    job.data.write_bytes('text\tlabel\n"größer\nthan"\t1\nx\t0\n'.encode())
    command = "python" + refused(job, capsys, "--task", "seq-cls").partition(": python")[2]
    subprocess.run(["bash", "-c", command], check=True, timeout=60)
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"text": "größer\nthan", "label": 1}, {"text": "x", "label": 0}]
