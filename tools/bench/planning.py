"""Time to plan a forward pass on the host: ``python -m skv_tools.bench.planning [LAYERS]``."""

import sys
import time

from skv_dist.config.policy import build_policy
from skv_dist.config.routing import RoutingConfig
from skv_dist.routing.draw import DrawKey
from skv_dist.versions import software


def main() -> int:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(f"{software()}; {layers} layers; draw, check and liveness at every boundary")
    for policy in ("r_cla", "subset", "rd_cla"):
        drawn = build_policy(RoutingConfig(policy=policy), layers)
        times = []
        for step in range(200):
            began = time.perf_counter()
            plan = drawn.plan(DrawKey(1, step, 0))
            for layer in range(layers):
                plan.live_after(layer)
            times.append(time.perf_counter() - began)
        print(f"{policy:<8}{1e3 * sorted(times)[len(times) // 2]:.3f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
