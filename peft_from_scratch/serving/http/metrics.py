"""What Prometheus reads at /metrics: the queue, the pool, tokens and times.

`vllm:…` are the names by which the Gateway API's inference extension picks a server
(its model server protocol): the requests that wait, and the adapters in use.
"""

import time
from collections import Counter

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

NAMES = 50  # adapters with a label of their own; the others share one
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
IN_USE = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]


class Metrics:
    """A registry of its own; its gauges read engine and pool when they are asked."""

    def __init__(self, engine, pool):
        self.engine, self.pool, self.tokens = engine, pool, Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.first_token = self._seconds("time_to_first_token")
        self.next_token = self._seconds("time_per_output_token")

    def _seconds(self, name: str) -> Histogram:
        full, words = f"peft_{name}_seconds", name.replace("_", " ")
        return Histogram(full, words, buckets=SECONDS, registry=self.registry)

    def count(self, adapter: str | None, tokens: int) -> None:
        """Tokens that an adapter wrote; None: the base."""
        name = adapter or "base"
        known = name in self.tokens or len(self.tokens) < NAMES
        self.tokens[name if known else "(others)"] += tokens

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def collect(self):
        """The families that are not counted here, as they are now."""
        engine, pool, cards = self.engine, self.pool, self.pool.cards()
        busy = {"running": engine.running, "waiting": engine.waiting}
        gauges = {f"peft_requests_{name}": value for name, value in busy.items()}
        gauges |= {f"vllm:num_requests_{name}": value for name, value in busy.items()}
        gauges["peft_pool_resident"] = sum(card.resident for card in cards)
        gauges["peft_pool_bytes"] = pool.bytes
        gauges["peft_pool_budget_bytes"] = pool.budget_bytes
        for name, value in gauges.items():
            yield GaugeMetricFamily(name, name.replace("_", " "), value)
        for name in ("hits", "misses", "evictions", "loads"):
            value = getattr(pool.counters, name)
            yield CounterMetricFamily(f"peft_pool_{name}", f"pool {name}", value)
        name, label = "peft_adapter_tokens", ["adapter"]
        tokens = CounterMetricFamily(name, "tokens written", labels=label)
        for name, value in list(self.tokens.items()):
            tokens.add_metric([name], value)
        yield tokens
        running, waiting = (",".join(sorted(names)) for names in engine.adapters())
        room = max(1, pool.budget_bytes // max([1, *(card.bytes for card in cards)]))
        name = "vllm:lora_requests_info"  # its value is the time
        info = GaugeMetricFamily(name, "adapters in use", labels=IN_USE)
        info.add_metric([str(room), running, waiting], time.time())
        yield info
