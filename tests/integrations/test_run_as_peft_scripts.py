"""Programs written for peft, unchanged, give with peft_fast in its place what they give with peft.

`test_scripts_suite` has more of them. The results are losses, logits, texts, names of files: see tests/scripts.
"""

from pathlib import Path

import pytest
from run_scripts import same, script


@pytest.mark.parametrize("name", ["trainer", "mixin"])
def test_results_are_those_with_peft(name: str, tmp_path: Path) -> None:
    """transformers' Trainer; its adapter methods and pipeline."""
    pytest.importorskip("accelerate")
    with_peft = script(name, tmp_path / "peft", peft=True)
    ours = script(name, tmp_path / "peft_fast")
    same(ours, with_peft, name)
    if name == "trainer":
        assert ours["resumed"] == ours["losses"] and ours["best_is_loaded"] and ours["loaded_equals_trained"]
        assert "model.safetensors" not in ours["files"]
    if name == "mixin":
        assert ours["again"] == ours["one"] == ours["peft_model"] != ours["base"] == ours["disabled"]
