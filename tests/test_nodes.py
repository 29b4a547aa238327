"""A layout on two hosts of a Ray cluster: where it goes, what is refused, and what happens when a host goes away."""

from __future__ import annotations

import importlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hosts import Host, Hosts, Run, why_not
from running import ROOT, TINY, deadline, eventually, require_proof, shape

from benchmarks import nodes_drills
from colocate.cluster import Cluster, environment
from colocate.config import MISSING, PASS, USAGE, Config, Stop, check_layout
from colocate.model_folder import Model
from colocate.nodes import ClusterWatch, Node, link, list_files, plan, require_room, write
from colocate.preflight import check_nodes, differences, engines_of, find_facts, full_gpus, preflight
from colocate.report import Report

# ---------------------------------------------------------------------------------------------------------------------
# Without Ray
# ---------------------------------------------------------------------------------------------------------------------


def nodes(*free: int, gpus: int = 8) -> list[Node]:
    return [Node(f"id{i}", f"10.0.0.{i}", f"host{i}", gpus, n) for i, n in enumerate(free)]


@pytest.mark.parametrize(
    "free, count, tp, per_node, expected",
    [
        ((8,), 4, 2, None, [("host0", 4)]),
        ((2, 8), 4, 2, None, [("host1", 4)]),  # all on one node, if one has room
        ((2, 2), 4, 2, None, [("host0", 2), ("host1", 2)]),
        ((3, 3), 4, 2, None, [("host0", 2), ("host1", 2)]),  # an engine is never split
        ((2, 4, 8), 12, 4, None, [("host1", 4), ("host2", 8)]),
        ((8, 8), 8, 2, 4, [("host0", 4), ("host1", 4)]),
        ((8, 8), 4, 2, 3, [("host0", 2), ("host1", 2)]),
        ((1, 1), 2, 2, None, []),  # not enough: what there is
        ((2, 1), 4, 2, None, [("host0", 2)]),
    ],
)
def test_where_a_layout_goes(free, count, tp, per_node, expected):
    assert [(node.name, take) for node, take in plan(nodes(*free), count, tp, per_node)] == expected


def test_nodes_that_cannot_hold_the_layout_are_refused_by_name():
    found = nodes(2, 1, gpus=2)
    with pytest.raises(Stop) as stop:
        require_room(plan(found, 4, 2), found, 4, 2, "10.0.0.1:6379", ["host9 (10.0.0.9): another torch"])
    assert stop.value.code == MISSING
    text = str(stop.value)
    assert "has 3 free GPUs, and 4 are needed, each 2 on one node" in text
    assert "host0 (10.0.0.0) has 2 of 2 free; host1 (10.0.0.1) has 1 of 2 free; host9 (10.0.0.9): another torch" in text
    assert "Try: --num-gpus 2" in text
    with pytest.raises(Stop, match=r"shard-size.* of 1 at most"):
        require_room([], nodes(1, 1), 2, 2, "auto")


@pytest.mark.parametrize(
    "free, push, chosen",
    [((4,), "auto", "auto"), ((2, 2), "auto", "gather"), ((2, 1), "auto", None), ((2, 2), "recorded", None)],
)
def test_shards_that_no_node_has_room_for_are_gathered(monkeypatch, free, push, chosen):
    config = Config(trainer="fsdp", shard_size=4, num_gpus=4, push=push)
    it = Cluster(config, Path(), True, ClusterWatch())
    it.unfit = {}
    monkeypatch.setattr(it, "_find_nodes", lambda: nodes(*free))
    if chosen is None:
        with pytest.raises(Stop, match="4 are needed"):
            it._plan()
        return
    assert sum(take for _, take in it._plan()) == 4
    assert it.config.push == chosen


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"min_gpus": 5}, "--min-gpus 5 must be .* from 2 .* to 4"),
        ({"min_gpus": 1}, "--min-gpus 1 must be .* Try: --min-gpus 2"),
        ({"gpus_per_node": 1}, "--gpus-per-node 1 holds no engine"),
    ],
)
def test_flags_of_a_cluster_that_cannot_be(flags, says):
    with pytest.raises(Stop, match=says) as stop:
        check_layout(Config(**flags))
    assert stop.value.code == USAGE


def test_what_a_node_lacks_is_one_line_each():
    ours = {"versions": {"python": "3.11.7", "torch": "2.13.0"}, "shm_mib": 9000, "model": "abc"}
    model = Model(Path("/m"), Path("/m"), "auto", {})
    assert differences(ours, ours | {"versions": {"python": "3.11.9", "torch": "2.13.0"}}, model, 1) == []
    theirs = {"versions": {"python": "3.12.1", "torch": "2.12.0", "vllm": "0.32"}, "shm_mib": 10, "model": ""}
    lines = differences(ours, theirs, model, 1)
    assert [re.split(r"[,.] ", line)[0] for line in lines] == [
        "it has python 3.12",
        "it has torch 2.12.0",
        "it has vllm 0.32",
        "the model's folder /m is not there",
        "its /dev/shm has 10 MiB free",
    ]


def test_a_model_of_the_hub_can_be_downloaded_on_a_node_that_lacks_it():
    folder = Path("/cache/hub/models--facebook--opt-125m/snapshots/27dcfa74")
    ours = {"versions": {}, "shm_mib": 9000, "model": "abc"}
    [line] = differences(ours, ours | {"model": ""}, Model(folder, folder, "auto", {}), 1)
    assert line.endswith("on each node, or try there: hf download facebook/opt-125m --revision 27dcfa74")


def test_a_node_needs_room_in_shm_for_all_engines_that_it_can_get():
    assert [engines_of(Config(num_gpus=8), free) for free in (1, 3, 6, 16)] == [1, 1, 3, 4]
    assert engines_of(Config(num_gpus=8, gpus_per_node=4), 8) == 2
    ours = {"versions": {}, "shm_mib": 330, "model": "abc"}
    model = Model(Path("/m"), Path("/m"), "auto", {})
    assert differences(ours, ours, model, 1) == []
    [line] = differences(ours, ours, model, 4)
    assert line.startswith("its /dev/shm has 330 MiB free, and 512 are needed")


def test_of_nodes_that_join_a_run_only_they_are_looked_at(monkeypatch):
    """The GPUs of the others are full of the run's own engines. A node that does not answer is not used."""
    old, new, mute = nodes(0, 2, 2)
    watch = ClusterWatch()
    watch.nodes[old.id] = old
    facts = find_facts("/m")
    gpu = {"index": "0", "name": "A", "total": 81559.0}
    gpus = {old.id: [gpu | {"free": 2000.0}], new.id: [gpu | {"free": 81000.0}] * 2}

    def ask(method, *args, each=None, seconds=0.0):
        return {node: facts | {"gpus": gpus[node]} for node in (watch.nodes if each is None else each) if node in gpus}

    monkeypatch.setattr(watch, "ask", ask)
    monkeypatch.setattr(watch, "start", lambda found, *_: watch.nodes.update({node.id: node for node in found}))
    monkeypatch.setattr(watch, "spread", lambda folder: None)
    monkeypatch.setattr("colocate.cluster.find_nodes", lambda: [old, new, mute])
    config = Config(ray_address="auto", steps=1, gpu_memory_utilization=0.4)
    model = SimpleNamespace(folder=Path("/m"), download="", rehearsal=False, config={}, parameters=500_000_000)
    report = Report(config, [])
    cluster = Cluster(config, Path(), rehearsal=False, watch=watch)
    cluster.check = partial(check_nodes, config, model, report)
    cluster._start_watchers(0.0)
    assert cluster.unfit == {mute.id: ["it does not answer"]}
    assert cluster._find_nodes() == [old, new]
    assert [*report.data["nodes"]] == [str(new)]


def test_what_a_lost_node_had_goes_where_gpus_per_node_leaves_room(monkeypatch):
    """A node's GPUs that the run has already count."""
    first, second, spare = nodes(4, 0, 2)  # of the first, the run has the other four
    watch = ClusterWatch()
    watch.nodes |= {node.id: node for node in (first, second, spare)}
    watch.gone[second.id] = "its watcher has ended"
    cluster = Cluster(Config(ray_address="auto", num_gpus=8, gpus_per_node=4), Path(), rehearsal=True, watch=watch)
    cluster.places = {bundle: (None, bundle % 4, first if bundle < 4 else second) for bundle in range(8)}
    booked = []
    groups = importlib.import_module("ray.util.placement_group")  # ray.util has a function of this name
    monkeypatch.setattr(groups, "remove_placement_group", lambda group: None)
    monkeypatch.setattr("colocate.cluster.find_nodes", lambda: [first, spare])
    monkeypatch.setattr(cluster, "_book", lambda bundles, node, deadline: booked.append((node.name, bundles)))
    assert cluster.move((0.0, 0.0, "")) == {6, 7}
    assert booked == [("host2", [4, 5])]


def test_a_node_whose_gpus_are_taken_past_ray_is_not_used():
    model = SimpleNamespace(config={}, parameters=500_000_000)
    config = Config(ray_address="auto", steps=1, gpu_memory_utilization=0.4)
    gpus = [{"index": str(i), "total": 81559.0, "free": free} for i, free in enumerate((81000.0, 2000.0, 80000.0))]
    assert full_gpus(config, model, gpus, 2) == []
    [line] = full_gpus(config, model, gpus, 3)
    assert line.startswith("GPU 1 has 2.0 GiB free, but the run needs") and "End what fills it" in line


def test_a_layout_may_go_on_smaller():
    [node] = nodes(2)
    watch = ClusterWatch()
    watch.nodes[node.id] = node
    watch.gone[node.id] = "its watcher has ended"
    for config, says in [
        (Config(ray_address="auto", min_gpus=2), ""),
        (Config(ray_address="auto"), r"2 GPUs are left of 4 \(host0 .*: its watcher has ended\).* Try: --min-gpus 2"),
    ]:
        cluster = Cluster(config, Path(), rehearsal=True, watch=watch)
        cluster.places = {0: (None, 0, None), 1: (None, 1, None)}
        with pytest.raises(Stop, match=says) if says else nullcontext():
            cluster.require_enough({2, 3})


def test_trainers_meet_over_the_interface_that_the_user_names(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    env = environment(Config(ray_address="auto", master_interface="ib0"), Path("/tmp"), rehearsal=True)
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "ib0"
    assert not env["PYTHONPATH"], "our folder may not be on the nodes: Ray brings the modules"


def test_flags_of_a_cluster_are_refused_without_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Stop, match=r"--min-gpus is for a cluster .* Try: --ray-address auto") as stop:
        preflight(Config(min_gpus=2), Report(Config(), []), tmp_path)
    assert stop.value.code == USAGE


def test_the_table_of_the_placement_shows_nodes_where_there_are_several(capsys):
    row = {"bundle": 0, "trainer_pid": 1, "engine": 0, "tp_rank": 0, "worker_pid": 2, "gpu": "GPU-a"}
    Report(Config(), []).placement([row])
    assert "node" not in capsys.readouterr().out
    Report(Config(), []).placement([row | {"node": "host1 (10.0.0.1)"}])
    assert re.search(r"node\n.*GPU-a +host1 \(10\.0\.0\.1\)", capsys.readouterr().out)


@pytest.mark.parametrize("example", ["slurm.sbatch", "kuberay.yaml"])
def test_the_flags_of_an_example_are_the_scripts(example):
    command = (ROOT / "examples" / example).read_text().partition("rlhf_colocate.py --")[2].partition("\n  shutdown")[0]
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z-]+)", "--" + command)}
    assert "num_gpus" in flags and flags <= Config.__dataclass_fields__.keys()


def test_the_example_of_kuberay_says_which_ray_it_is_for():
    """KubeRay takes no `authOptions` without it."""
    [version] = re.findall(r'^    rayVersion: "(.+?)"', (ROOT / "examples/kuberay.yaml").read_text(), re.MULTILINE)
    assert f"ray=={version}" in (ROOT / "requirements-cpu.txt").read_text().split()


@pytest.mark.parametrize(
    "lines, as_stated, back_s",
    [
        ([(9.9, "[step] 4/40"), (31.2, "[step] 5/40"), (41.0, "[lost] push: lost engine 1")], True, 21.2),
        ([(12.0, "[lost] push: lost engine 1"), (31.0, "[step] 5/40")], False, 21.0),
        ([(9.9, "[step] 4/40"), (41.0, "[step] 5/40")], False, None),
    ],
)
def test_a_drill_in_which_nothing_may_be_lost_can_fail(lines, as_stated, back_s):
    """By the lines from its strike, at 10 s, to the next one, at 40 s."""
    found = nodes_drills.look(nodes_drills.DRILLS["cut-20"], lines, struck=10.0, end=40.0, goes_on=True)
    assert found == {"as_stated": as_stated, "message_s": None, "back_s": back_s}


def test_a_drill_in_which_the_run_ends_says_what_is_missing():
    drill = nodes_drills.DRILLS["node"]
    lines = [(13.0, "the node host2 (10.77.0.2) is gone"), (14.0, "FAIL: no whole replica is left, and no checkpoint")]
    assert not nodes_drills.look(drill, lines, 10.0, 99.0, goes_on=False)["as_stated"]
    lines[1:] = [(14.0, "FAIL: the node that is gone had shards of trainer 0 and trainer 1's replica")]
    expected = {"as_stated": True, "message_s": 3.0, "back_s": None}
    assert nodes_drills.look(drill, lines, 10.0, 99.0, goes_on=False) == expected


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_name_tells_whether_a_disk_is_shared(monkeypatch, tmp_path, shared):
    """On a network's disk what another host says of a folder's files may be old."""
    watch = ClusterWatch()
    asked = []

    def ask(method, each, seconds):
        asked.append(method)
        ((node, args),) = each.items()
        answers = {"call": shared and os.path.exists(args[-1]), "list_files": {"a": (3, 0)}, "read": b"new"}
        return {node: answers.get(method)}

    monkeypatch.setattr(watch, "ask", ask)
    (tmp_path / "a").write_bytes(b"old")
    watch.fetch(tmp_path, "id1")
    assert (tmp_path / "a").read_bytes() == (b"old" if shared else b"new")
    assert asked == (["call"] if shared else ["call", "list_files", "read", "remove_folder"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


WATCHER = """
import sys
from colocate.nodes import NodeWatch
watch = NodeWatch(*sys.argv[1:3])
watch.early_files.add(sys.argv[3])
watch.note_files()
print("watching", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_nothing_stays_on_a_node_whose_watcher_leaves_or_is_killed(tmp_path, how):
    """Neither processes nor files, of this run; those of others stay."""
    mark = f"r{secrets.token_hex(4)}"
    folder = tmp_path / "run"
    files = [Path(f"/dev/shm/{name}") for name in (f"{mark}-queue", f"no-{mark}")]  # the second was seen in use
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    watcher = WATCHER if how == "kill" else WATCHER + "watch.leave()"
    command = [sys.executable, "-c", watcher, mark, str(folder), files[1].name]
    with (
        subprocess.Popen(sleep, **pipes, env=os.environ | {"MARK": f"/{mark}"}) as ours,
        subprocess.Popen(sleep, **pipes) as other,
        subprocess.Popen(command, **pipes, cwd=ROOT) as watch,
    ):
        try:
            assert [p.stdout.readline() for p in (ours, other, watch)] == ["\n", "\n", "watching\n"]
            for file in files:
                file.write_bytes(b"x")
            assert folder.is_dir()
            if how == "kill":
                watch.kill()
            else:
                watch.stdin.close()
            assert eventually(lambda: ours.poll() is not None)
            assert eventually(lambda: not any(path.exists() for path in (folder, *files)))
            assert other.poll() is None
        finally:
            for process in (ours, other, watch):
                process.kill()
            for file in files:
                file.unlink(missing_ok=True)


def test_a_folder_is_told_from_another_one(tmp_path):
    """By its content's times, too: a checkpoint that replaces another has files of the same sizes."""
    one, copy = tmp_path / "one", tmp_path / "copy"
    write(one / "a" / "state", 0, b"xx")
    link(one / "model", "/models/x")
    found = list_files(one)
    assert found["model"] == "/models/x" and found["a/state"][0] == 2
    shutil.copytree(one, copy, symlinks=True)  # times and all
    assert list_files(copy) == found
    write(copy / "a" / "state", 0, b"yy")
    assert list_files(copy) != found


# ---------------------------------------------------------------------------------------------------------------------
# On two hosts
# ---------------------------------------------------------------------------------------------------------------------

REASON = why_not()
needs_hosts = pytest.mark.skipif(bool(REASON), reason=REASON)
TWO = ["--num-gpus", "4", "--tensor-parallel-size", "2", "--dtype", "float32", "--max-tokens", "8"]
TWO += ["--prompts-per-step", "4", "--group-size", "4"]


@pytest.fixture(scope="module")
def hosts():
    """Two hosts with two logical GPUs each. The second has none of our files: Ray has to bring them."""
    with Hosts(2) as made:
        made[1].hide(ROOT, ".venv")
        for host in made.hosts:
            made.start_ray(host, 2)
        made.wait_for_gpus(4, deadline(60))
        yield made


@pytest.fixture
def shared():
    """A folder that all hosts see: their /tmp is their own."""
    folder = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder)


def kill_worker(host: Host) -> None:
    """SIGKILL to one of vLLM's workers on a host."""
    pids = [pid for pid, text in host.processes().items() if text.startswith("ray::RayWorkerProc")]
    host.run("kill", "-9", str(pids[-1]))


@pytest.mark.e2e
@needs_hosts
def test_two_hosts_lose_a_worker_and_then_one_of_them(hosts, shared):
    first, second = hosts
    # Many steps, of a tenth of a second each: the run goes on while a worker is looked for.
    at = [(r"\[step\] +1/", lambda: kill_worker(second)), ("recovered in", lambda: None), (r"\[step\] ", second.kill)]
    flags = ["--steps", "60", "--max-restarts", "2", "--min-gpus", "2", "--trainer", "fsdp", "--shard-size", "2"]
    run = Run(hosts, shared, *TWO, *flags, *shape(shared, **TINY), at=at, seconds=deadline(300))
    assert run.code == PASS, run.output
    require_proof(run.report)
    # Shards within a host, replicas between them.
    assert "FSDP2 in shards of 2" in run.output and "2 replicas bitwise identical" in run.output
    rows = run.report["placement"]
    assert [row["node"] for row in rows] == ["host1 (10.77.0.1)"] * 2 + ["host2 (10.77.0.2)"] * 2
    assert [row["engine"] for row in rows] == [0, 0, 1, 1] and len({row["gpu"] for row in rows}) == 4
    worker, host = run.report["losses"]
    assert worker["lost"] == ["engine 1"] and re.search("engine 1 rank . .* has ended on host2", worker["message"])
    assert "the node host2 (10.77.0.2) " in host["message"] and "ActorUnavailable" not in host["message"]
    assert "the node host2 (10.77.0.2) is gone (its watcher has ended)" in run.output
    assert "Traceback" not in run.output
    assert [row["step"] for row in run.report["steps"]] == [*range(1, 61)]
    assert eventually(lambda: not first.left()), first.left()
