"""Processes that cannot meet, and a CPU that is asked for beside a GPU: one sentence."""

from typing import Any


def refusals() -> list[str]:
    import os
    import socket
    from unittest import mock

    import torch
    import torch.distributed as dist

    from skv_dist.config.parallel import ParallelConfig
    from skv_dist.errors import UserError
    from skv_dist.parallel.processes import cpu_platform, groups

    def refusal() -> str:
        try:
            groups.start(ParallelConfig())
        except UserError as error:
            return str(error)
        raise AssertionError("not refused")

    with socket.socket() as busy, mock.patch.dict(os.environ, {"DS_ACCELERATOR": "cpu"}):
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        os.environ["MASTER_PORT"] = str(port)

        def meet(*_: Any, **__: Any) -> None:
            dist.TCPStore("127.0.0.1", port, 1, is_master=True)

        with (
            mock.patch.object(dist, "is_initialized", return_value=False),
            mock.patch.object(dist, "init_process_group", meet),
            mock.patch.object(cpu_platform, "install"),
        ):
            in_use = refusal().replace(str(port), "PORT")
        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            return [in_use, refusal()]


def test_a_port_in_use_and_a_gpu_beside_the_cpu_are_refused(workers: Any) -> None:
    in_use, both = workers(1)(refusals)[0]
    assert in_use.startswith("the processes cannot meet at 127.0.0.1, port PORT (")
    assert "EADDRINUSE" in in_use
    assert "MASTER_PORT to a port that is free" in in_use
    assert "\n" not in in_use
    assert both.startswith("DS_ACCELERATOR is cpu, but torch sees a GPU: set CUDA_VISIBLE_DEVICES to nothing")
