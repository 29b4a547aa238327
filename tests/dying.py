"""The script with a layout that fails, or is killed, at one moment of its start: python dying.py WHO WHEN HOW FLAGS.

WHO WHEN: see `MOMENTS`. HOW: "kill" (SIGKILL to that very process) or "raise".
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rlhf_colocate as rc
from colocate import rounds

MOMENTS = {
    "trainer": ("import", "loaded"),
    "engine": ("start", "started"),
    "worker": ("import", "load_model", "compile_or_warm_up_model", "report_device_id"),
}


def die(who: str, when: str) -> None:
    """Only if this is the moment that the command line asked for."""
    how, *moment = os.environ.get("RLHF_TEST_DYING", "").split()
    if moment != [who, when]:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f"on purpose: {who} {when}")


class Trainer(rc.RayTrainingActor):
    def __init__(self, *args):
        die("trainer", "import")
        super().__init__(*args)
        die("trainer", "loaded")


class Engine(rc.MyLLM):
    def start(self, *args, **options):
        die("engine", "start")
        reports = super().start(*args, **options)
        die("engine", "started")
        return reports


class Extension(rounds.Extension):
    """Of vLLM's workers, which import it before they load the model."""

    def report_device_id(self):
        die("worker", "report_device_id")
        return super().report_device_id()


def die_before(cls: type, name: str) -> None:
    method = getattr(cls, name)

    def dying(self, *args, **options):
        die("worker", name)
        return method(self, *args, **options)

    setattr(cls, name, dying)


class Layout(rc.Colocation):
    trainer_class = Trainer
    engine_class = Engine
    worker_extension = "dying.Extension"


if __name__ == "__main__":
    import dying  # under this name Ray's processes find it

    who, when, how, *flags = sys.argv[1:]
    os.environ["RLHF_TEST_DYING"] = f"{how} {who} {when}"
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    sys.exit(rc.main(flags, layout=dying.Layout))
elif "vllm.v1.worker.worker_base" in sys.modules and os.environ.get("RLHF_TEST_DYING"):
    die("worker", "import")
    from vllm.v1.worker.cpu_worker import CPUWorker

    die_before(CPUWorker, "load_model")
    die_before(CPUWorker, "compile_or_warm_up_model")
