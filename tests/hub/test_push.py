"""A push is whole or nothing, private unless said otherwise, and tells in a sentence why it failed."""

import json
import time

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import save

from medclip_hf.hub import push
from medclip_hf.hub.errors import HubError, hub_errors
from medclip_hf.hub.push import files_to_push, push_folder

REPOSITORY = "clinic/model"
WEIGHTS, OLD_WEIGHTS = save({"weight": np.ones(3)}), save({"weight": np.zeros(3)})


@pytest.fixture
def api(hub, monkeypatch):
    """The real client of the clinic's account; pauses are not waited for."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return HfApi(endpoint=hub.url, token="hf_clinic")


@pytest.fixture
def folder(tmp_path):
    """A model's folder as far as the Hub is concerned."""
    folder = tmp_path / "final"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "medclip_hf.yaml").write_text("[]")
    return folder


def test_a_push_makes_a_private_repository_with_every_file_in_one_commit(hub, api, folder):
    pushed = push_folder(folder, REPOSITORY, api=api)
    repository = hub.repository(REPOSITORY)
    assert repository.is_private
    assert len(repository.history) == 2  # the empty one, and ours
    assert repository.history[-1].sha == pushed.commit
    assert repository.files["model.safetensors"] == WEIGHTS
    assert set(pushed.files) == {".eval_results/medclip_hf.yaml", "README.md", "config.json", "model.safetensors"}
    assert pushed.url == f"{hub.url}/{REPOSITORY}"


def test_only_the_word_private_false_makes_a_public_repository(hub, api, folder):
    push_folder(folder, REPOSITORY, private=False, api=api)
    assert not hub.repository(REPOSITORY).is_private


def test_a_push_to_a_repository_that_is_public_is_refused_until_that_is_said(hub, api, folder):
    hub.add(REPOSITORY, {}, is_private=False)
    with pytest.raises(HubError, match="is public"):
        push_folder(folder, REPOSITORY, api=api)
    assert len(hub.repository(REPOSITORY).history) == 1
    push_folder(folder, REPOSITORY, private=False, api=api)
    assert len(hub.repository(REPOSITORY).history) == 2


def test_the_same_push_twice_makes_no_second_commit(hub, api, folder):
    first = push_folder(folder, REPOSITORY, api=api)
    second = push_folder(folder, REPOSITORY, api=api)
    assert second.commit == first.commit
    assert len(hub.repository(REPOSITORY).history) == 2


def test_weights_of_an_earlier_push_go_with_the_commit_that_replaces_them(hub, api, folder):
    push_folder(folder, REPOSITORY, api=api)
    (folder / "model.safetensors").unlink()
    (folder / "model-00001-of-00001.safetensors").write_bytes(WEIGHTS)
    (folder / "model.safetensors.index.json").write_text("{}")
    pushed = push_folder(folder, REPOSITORY, api=api)
    assert pushed.removed == ("model.safetensors",)
    files = hub.repository(REPOSITORY).files
    assert "model.safetensors" not in files
    assert "model-00001-of-00001.safetensors" in files


def test_an_adapter_leaves_the_weights_of_the_model_beside_it_alone(hub, api, folder, tmp_path):
    push_folder(folder, REPOSITORY, api=api)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "clinic/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    assert push_folder(adapter, REPOSITORY, api=api).removed == ()
    assert "model.safetensors" in hub.repository(REPOSITORY).files


def test_a_data_set_sends_its_rows_and_its_card_and_nothing_else(hub, api, tmp_path):
    folder = tmp_path / "rows"
    (folder / "dropped").mkdir(parents=True)
    for name in ("README.md", "report.json", "dropped/train.jsonl"):
        (folder / name).write_text("x")
    pq.write_table(pa.table({"caption": ["left"]}), folder / "train-00000.parquet")
    push_folder(folder, "clinic/rows", repo_type="dataset", api=api)
    assert set(hub.repository("clinic/rows", "dataset").files) == {".gitattributes", "README.md", "train-00000.parquet"}


def test_a_space_is_made_for_gradio(hub, api, tmp_path):
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "README.md").write_text("---\nsdk: gradio\n---\n")
    (folder / "app.py").write_text("")
    pushed = push_folder(folder, "clinic/demo", repo_type="space", api=api)
    assert hub.repository("clinic/demo", "space").sdk == "gradio"
    assert pushed.url == f"{hub.url}/spaces/clinic/demo"


# What fails leaves nothing behind


@pytest.mark.parametrize(
    ("status", "named"),
    [
        (401, "does not accept your token"),
        (403, "write permission"),
        (404, "no repository"),
        (409, "changed by somebody else"),
        (412, "changed by somebody else"),
        (413, "refused the request"),
        (429, "too many requests"),
        (503, "Try again later"),
        (None, "connection"),
    ],
)
@pytest.mark.parametrize("step", ["POST /api/repos/create", "GET .*/tree/", "PUT /lfs/", "POST .*/commit/"])
def test_each_failure_is_a_sentence_and_leaves_no_repository(hub, hub_server, api, folder, step, status, named):
    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    hub.faults = [hub_server.Fault(step, status, headers=headers)]
    with pytest.raises(HubError, match=named) as caught:
        push_folder(folder, REPOSITORY, api=api, patience_s=3)
    assert caught.value.status == status
    assert hub.repository(REPOSITORY) is None
    hub.faults = []
    push_folder(folder, REPOSITORY, api=api)  # and the same push succeeds afterwards
    assert hub.repository(REPOSITORY).files["model.safetensors"] == WEIGHTS


def test_a_failed_push_leaves_a_repository_of_before_as_it_was(hub, hub_server, api, folder):
    hub.add(REPOSITORY, {"model.safetensors": OLD_WEIGHTS}, is_private=True)
    hub.faults = [hub_server.Fault("PUT /lfs/", 403)]
    with pytest.raises(HubError):
        push_folder(folder, REPOSITORY, api=api, patience_s=3)
    assert len(hub.repository(REPOSITORY).history) == 2
    assert hub.repository(REPOSITORY).files["model.safetensors"] == OLD_WEIGHTS


def test_a_passing_failure_is_waited_out(hub, hub_server, api, folder, monkeypatch):
    pauses = []
    monkeypatch.setattr(push.time, "sleep", pauses.append)
    hub.faults = [
        hub_server.Fault("/commit/", 429, times=1, headers={"Retry-After": "7"}),
        hub_server.Fault("/commit/", 503, times=1),
        hub_server.Fault("/commit/", None, times=1),
    ]
    push_folder(folder, REPOSITORY, api=api)
    assert pauses == [7, 2, 4]
    assert len(hub.repository(REPOSITORY).history) == 2


def test_the_hub_may_not_make_us_wait_longer_than_we_are_patient(hub, hub_server, api, folder, monkeypatch):
    pauses = []
    monkeypatch.setattr(push.time, "sleep", pauses.append)
    hub.faults = [hub_server.Fault("/commit/", 429, headers={"Retry-After": "3600"})]
    with pytest.raises(HubError, match="Wait 3600 seconds"):
        push_folder(folder, REPOSITORY, api=api)
    assert pauses == []


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, hub_server, api, folder):
    hub.faults = [hub_server.Fault("/commit/", None, times=1, is_late=True)]
    pushed = push_folder(folder, REPOSITORY, api=api)
    assert len(hub.repository(REPOSITORY).history) == 2
    assert hub.repository(REPOSITORY).history[-1].sha == pushed.commit


def test_a_repository_whose_making_was_not_confirmed_is_taken_back_too(hub, hub_server, api, folder):
    hub.faults = [
        hub_server.Fault("/api/repos/create", None, times=1, is_late=True),
        hub_server.Fault("/commit/", 403),
    ]
    with pytest.raises(HubError, match="write permission"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.repositories == {}


def test_a_repository_that_another_made_at_the_same_time_stays_theirs(hub, hub_server, api, folder):
    hub.faults = [
        hub_server.Fault("/api/repos/create", 409, then=lambda: hub.add(REPOSITORY, {}, is_private=True)),
    ]
    with pytest.raises(HubError, match="that name is taken"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.repository(REPOSITORY) is not None


def test_a_repository_in_which_something_came_to_be_is_not_taken_back(hub, hub_server, api, folder):
    hub.faults = [
        hub_server.Fault(
            "/commit/", 403, then=lambda: hub.repository(REPOSITORY).commit({"a": b"theirs"}, "from elsewhere")
        ),
    ]
    with pytest.raises(HubError):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.repository(REPOSITORY).files == {"a": b"theirs"}


def test_a_commit_that_another_was_faster_than_is_refused_and_the_other_stays(hub, hub_server, api, folder):
    repository = hub.add(REPOSITORY, {}, is_private=True)
    hub.faults = [
        hub_server.Fault(
            "/preupload/", None, times=1, is_late=True, then=lambda: repository.commit({"a": b"b"}, "other")
        )
    ]
    with pytest.raises(HubError, match="changed by somebody else"):
        push_folder(folder, REPOSITORY, api=api)
    assert repository.files == {"a": b"b"}


def test_somebody_elses_namespace_and_repository_are_refused(hub, api, folder):
    with pytest.raises(HubError, match="write permission"):
        push_folder(folder, "guest/model", api=api)
    hub.add("guest/model", {}, is_private=False)
    with pytest.raises(HubError, match="write permission"):
        push_folder(folder, "guest/model", private=False, api=api)


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_without_a_valid_token_nothing_is_sent(hub, folder, api, token):
    with pytest.raises(HubError, match=r"hf auth login"):
        push_folder(folder, REPOSITORY, api=HfApi(endpoint=hub.url, token=token))
    assert hub.repositories == {}


# What is not sent at all


def test_hidden_files_and_caches_stay_behind(folder):
    for name in (".env", ".git/config", ".cache/x", "__pycache__/a.pyc", "sub/.hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert set(files_to_push(folder)) == {
        ".eval_results/medclip_hf.yaml",
        "README.md",
        "config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "weights.PTH", "states/a.pkl"])
def test_files_that_run_code_when_read_are_refused(hub, api, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match="can run code"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.requests == []


def test_a_link_out_of_the_folder_is_refused(hub, api, folder, tmp_path):
    (tmp_path / "patients.csv").write_text("secret")
    (folder / "rows.csv").symlink_to(tmp_path / "patients.csv")
    with pytest.raises(ValueError, match=r"rows\.csv is a link"):
        push_folder(folder, REPOSITORY, api=api)
    (folder / "rows.csv").unlink()
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="more is a link"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.requests == []


def test_a_folder_that_is_no_model_is_refused(api, tmp_path):
    with pytest.raises(ValueError, match="is no model"):
        push_folder(tmp_path, REPOSITORY, api=api)
    with pytest.raises(ValueError, match="is not a folder"):
        push_folder(tmp_path / "absent", REPOSITORY, api=api)


@pytest.mark.parametrize("name", ["model", "/home/jane/model", "a/b/c", "clinic/mo del"])
def test_a_name_that_is_no_repository_is_refused(folder, api, name):
    with pytest.raises(ValueError, match="repo_id"):
        push_folder(folder, name, api=api)


def test_an_adapter_whose_base_is_a_folder_of_this_disk_is_refused(api, folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(ValueError, match="Push the base first"):
        push_folder(folder, REPOSITORY, api=api)


def test_what_the_check_finds_stops_the_push(hub, api, folder):
    with pytest.raises(ValueError, match=r"Nothing was sent: the check of final found 1 problems: rows\.csv: a name"):
        push_folder(folder, REPOSITORY, api=api, check=lambda folder: ["rows.csv: a name"])
    assert hub.requests == []


def test_without_a_check_of_ones_own_paths_and_tokens_are_looked_for(hub, api, folder):
    (folder / "README.md").write_text("Started from /home/jane/models/base.")
    with pytest.raises(ValueError, match=r"README\.md .*path of a disk"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.requests == []


def test_metadata_that_the_hub_refuses_is_told_in_its_words(hub, hub_server, api, folder):
    hub.faults = [hub_server.Fault("/validate-yaml", 400, headers={"X-Error-Message": "license is not known"})]
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.repository(REPOSITORY) is None


# Reading


def test_errors_of_reading_are_sentences_too(hub, api, tmp_path):
    hub.add("guest/gated", {"config.json": b"{}"}, is_gated=True)
    hub.add("clinic/open", {"config.json": b"{}"})
    for name, options, sentence in (
        ("guest/gated", {}, "accept its conditions"),
        ("clinic/absent", {}, "no repository clinic/absent"),
        ("clinic/open", {"revision": "v9"}, "no such revision"),
        ("clinic/open", {"filename": "model.safetensors"}, "lacks a file"),
        ("not a name", {}, "no repository on the Hub and no folder"),
    ):
        asked = {"filename": "config.json", "cache_dir": tmp_path, "token": "hf_clinic", "endpoint": hub.url} | options
        with pytest.raises(HubError, match=sentence), hub_errors(name):
            huggingface_hub.hf_hub_download(name, **asked)


def test_a_hub_that_is_not_there_is_a_sentence(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(HubError, match=r"The connection to http://127\.0\.0\.1:9 failed"):
        push_folder(folder, REPOSITORY, api=HfApi(endpoint="http://127.0.0.1:9", token="hf_clinic"), patience_s=1)


def test_errors_that_are_not_the_hubs_pass_as_they_are():
    with pytest.raises(KeyError), hub_errors(REPOSITORY):
        raise KeyError("x")


def test_an_interrupt_takes_the_new_repository_away(hub, api, folder, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push_folder(folder, REPOSITORY, api=api)
    assert hub.repositories == {}
