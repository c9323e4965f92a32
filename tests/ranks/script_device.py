"""Ranks that stream from one pinned memory to a device apart, the simulated one: ``python script_device.py CACHE``.

Each trains alone, since gloo knows nothing of that device, and compares with the CPU's whole run; then a frozen weight
is written to, which the other rank must not see.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from msgspec.structs import replace
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.run.attach import attach_on
from tests.device import backend
from tests.device.test_sim import batches, on_host
from tests.run import test_parity
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.training import CPU, assert_equal, make, train

SIM = torch.device("sim", 0)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    test_parity.CPU = replace(CPU, name="test-cuda", device="cuda")
    with sdpa_kernel(SDPBackend.MATH):
        whole = train(make("llama"), "llama")
    with backend.present("copies first"):
        model = make("llama")
        plan = plan_for(model, "llama", share=0.0, offload=("model.layers.1",), tiers="all")
        with attach_on(model, plan, SIM, checked=True, cache=Path(sys.argv[1])) as handle:
            run = train(model, "llama", batches=batches)
            sources = [home.source for home in inside.tiers(handle).homes.values() if hasattr(home.source, "part")]
            shared = [source for source in sources if source.handed_out is not None]
            print("pinned and shared", len(shared), all(source.part.is_pinned() for source in shared), flush=True)
            name = next(
                name for name, p in model.named_parameters() if name.endswith("layers.3.mlp.up_proj.base_layer.weight")
            )
            weight = model.get_parameter(name)
            before = weight.detach().cpu().clone()
            dist.barrier()
            if dist.get_rank() == 1:
                with torch.no_grad():
                    weight.mul_(2)
            dist.barrier()
            now = weight.detach().cpu().clone()
            kept = model.state_dict()[name].cpu()
            factor = 1 + dist.get_rank()
            print("written", torch.equal(now, before * factor), torch.equal(kept, before * factor), flush=True)
    assert_equal(whole, on_host(run))
    print("same", handle.record.loads > 0, os.environ["RANK"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
