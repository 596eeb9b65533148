"""PEFT's registry: an ordinary member of its enum, registered once, and only by the import."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import peft
from ewora_models import adapted, llama, randomise
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hub_router.ewora import EworaConfig, EworaModel, register

LOAD = (
    "from transformers import AutoModelForCausalLM\n"
    "from peft import PeftModel\n"
    "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "model = PeftModel.from_pretrained(base, sys.argv[2])\n"
    "print(type(model.base_model).__name__)\n"
)


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False)


def test_member_is_like_any_other() -> None:
    member = PeftType.EWORA
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert (member.name, member.value, member) == ("EWORA", "EWORA", "EWORA")
    assert PeftType("EWORA") is PeftType["EWORA"] is member
    assert list(PeftType)[-1] is member and PeftType.__members__["EWORA"] is member
    assert "EWORA" in list(PeftType) and member in PeftType
    assert hash(member) == hash("EWORA") and {member: 1}["EWORA"] == 1
    assert copy.deepcopy(member) is member and pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "EWORA")
    assert len(set(PeftType)) == len(PeftType)


def test_registered_under_member_and_string() -> None:
    for key in ("EWORA", PeftType.EWORA):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is EworaConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is EworaModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "ewora_"
    config = peft.get_peft_config({"peft_type": "EWORA", "r": 6, "n": 2})
    assert config == EworaConfig(r=6, n=2)


def test_registering_again_does_nothing() -> None:
    before = list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING)) == before


def test_config_survives_pickle_in_another_process() -> None:
    data = pickle.dumps(EworaConfig(r=6, n=3)).hex()
    done = run("import pickle, sys\nprint(pickle.loads(bytes.fromhex(sys.argv[1])).peft_type)", data)
    assert done.stdout.strip().endswith("EWORA"), done.stderr


def test_type_of_peft_itself_is_not_replaced() -> None:
    code = (
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING\n"
        "from peft import LoraModel\n"
        "PEFT_TYPE_TO_TUNER_MAPPING['EWORA'] = LoraModel\n"
        "import hub_router.ewora\n"
    )
    done = run(code)
    assert done.returncode == 1
    assert "has a type EWORA already (peft.tuners.lora.model.LoraModel), expected none" in done.stderr


def test_loading_needs_the_import(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    randomise(adapted(llama()), 1).save_pretrained(tmp_path / "adapter")
    without = run("import sys\nimport hub_router\n" + LOAD, tmp_path / "base", tmp_path / "adapter")
    assert without.returncode == 1
    assert without.stderr.rstrip().endswith("KeyError: 'EWORA'")
    with_it = run("import sys\nimport hub_router.ewora\n" + LOAD, tmp_path / "base", tmp_path / "adapter")
    assert with_it.returncode == 0, with_it.stderr
    assert with_it.stdout.strip() == "EworaModel"
