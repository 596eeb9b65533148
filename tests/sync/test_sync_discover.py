from __future__ import annotations

from hub_router.sync.discover import AdapterFolder, find_adapters, unsafe_paths

PAIR = ("adapter_config.json", "adapter_model.safetensors")


def tree(*paths: str, **sizes: int) -> dict[str, int]:
    return dict.fromkeys(paths, 10) | sizes


def adapter(*folders: str) -> list[str]:
    return [f"{folder}/{name}" if folder else name for folder in folders for name in PAIR]


def found(sizes: dict[str, int], within: tuple[str, ...] = ("",)) -> list[str]:
    return [folder.subfolder for folder in find_adapters(sizes, within)]


def test_top_and_subfolders_at_any_depth() -> None:
    assert found(tree(*adapter("", "a", "answerability/granite-3b/lora"))) == ["", "a", "answerability/granite-3b/lora"]


def test_only_needed_files_are_named() -> None:
    names = [
        *adapter(""),
        *("README.md", "samples.jsonl", "test.jsonl", "training_args.bin", "optimizer.pt", "tokenizer.json"),
        *("model.safetensors", "pytorch_model.bin", "adapter_model.bin", "eval_results.json"),
    ]
    assert find_adapters(tree(*names)) == [
        AdapterFolder("", (*PAIR, "README.md", "samples.jsonl", "test.jsonl")),
    ]


def test_pickle_is_taken_where_there_is_no_safetensors() -> None:
    [folder] = find_adapters(tree("adapter_config.json", "adapter_model.bin", "training_args.bin"))
    assert folder.files == ("adapter_config.json", "adapter_model.bin")


def test_shards_come_with_their_index() -> None:
    shards = [f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    [folder] = find_adapters(tree("adapter_config.json", "adapter_model.safetensors.index.json", *shards))
    assert folder.files == ("adapter_config.json", "adapter_model.safetensors.index.json", *shards)


def test_cards_of_parent_folders_come_along_nearest_first() -> None:
    [folder] = find_adapters(tree(*adapter("a/b"), "README.md", "a/b/README.md", "c/README.md"))
    assert folder.files[2:] == ("a/b/README.md", "README.md")


def test_newest_checkpoint_stands_for_a_folder_without_adapter() -> None:
    names = adapter("run/checkpoint-9", "run/checkpoint-100", "run/checkpoint-20", "other/checkpoint-1")
    assert found(tree(*names)) == ["other/checkpoint-1", "run/checkpoint-100"]


def test_checkpoints_below_an_adapter_are_its_history() -> None:
    assert found(tree(*adapter("", "checkpoint-10", "checkpoint-20"))) == [""]


def test_checkpoint_asked_for_by_name_is_taken() -> None:
    sizes = tree(*adapter("", "checkpoint-10", "checkpoint-20"))
    assert found(sizes, ("checkpoint-10",)) == ["checkpoint-10"]
    assert found(sizes, ("", "checkpoint-10")) == ["", "checkpoint-10"]


def test_folder_asked_for_may_hold_several() -> None:
    sizes = tree(*adapter("llama2/sst2", "llama2/cola", "llama3/sst2", "llama2x"))
    assert found(sizes, ("llama2",)) == ["llama2/cola", "llama2/sst2"]
    assert found(sizes, ("nothing",)) == []


def test_hidden_and_archive_shadow_files_are_ignored() -> None:
    assert found(tree(*adapter("__MACOSX/a", ".cache/a"), "a/._adapter_config.json", "a/adapter_model.bin")) == []


def test_unsafe_paths_are_ignored_and_reported() -> None:
    sizes = tree(*adapter("../../evil", "good"), "/abs/adapter_config.json", "good/../x/adapter_config.json")
    assert found(sizes) == ["good"]
    assert sorted(unsafe_paths(sizes)) == sorted(
        [*adapter("../../evil"), "/abs/adapter_config.json", "good/../x/adapter_config.json"]
    )


def test_config_without_weights_is_a_problem() -> None:
    [folder] = find_adapters(tree("adapter_config.json", "README.md"))
    assert folder.files == ()
    assert folder.problem == "no adapter_model.safetensors or adapter_model.bin beside adapter_config.json"


def test_oversized_files_are_left_out_with_a_reason() -> None:
    sizes = tree(*adapter("")) | {"README.md": 1_000_001, "samples.jsonl": 32_000_001}
    [folder] = find_adapters(sizes)
    assert folder.files == PAIR
    assert folder.notes == (
        "README.md ignored: 1000001 bytes, at most 1000000 are read",
        "samples.jsonl ignored: 32000001 bytes, at most 32000000 are read",
    )
    [folder] = find_adapters(tree(*adapter("")) | {"adapter_config.json": 1_000_001})
    assert "1000001 bytes" in folder.problem
