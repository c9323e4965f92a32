"""Ranks that stream from one pinned memory to a device apart, the simulated one: ``python script_device.py CACHE``.

Each trains alone, since gloo knows nothing of that device, and compares with the CPU's whole run; then one writes to a
frozen weight, which the other must not see.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from memplan.run.attach import attach
from tests.run.test_parity import plan_for
from tests.support import devices, inside
from tests.support.training import assert_equal, make


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with devices.on("copies-first") as apart:
        model = make("llama")
        plan = plan_for(model, "llama", share=0.0, offload=("model.layers.1",))
        with attach(model, plan, checked=True, cache=Path(sys.argv[1])) as handle:
            run = apart.train(model, "llama")
            on_disk = {item.block for item in plan.items if item.home == "disk"}
            size_bytes = sum(block.size_bytes for block in plan.table.blocks if block.id in on_disk)
            print("read", inside.bytes_read_from_disk(handle), "of", size_bytes, flush=True)
            sources = [home.source for home in inside.tiers(handle).homes.values() if hasattr(home.source, "part")]
            shared = [source for source in sources if source.handed_out is not None]
            print("pinned and shared", len(shared), all(source.part.is_pinned() for source in shared), flush=True)
            name = next(
                name for name, _ in model.named_parameters() if name.endswith("layers.3.mlp.up_proj.base_layer.weight")
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
        assert_equal(devices.whole_of(apart, "llama"), run)
    print("same", handle.record.loads > 0, os.environ["RANK"], flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
