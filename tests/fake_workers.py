"""Workers that "sample" a fixed function of the tokens before, and what a scheduler is asked over them."""

from r1_cluster.records import Request, SamplingParams, StepPlan, StepResult, unpack_int32

GREEDY = SamplingParams(0.0, 1.0, 0, 0)


def request(name, prompt, max_tokens=5, **kwargs):
    return Request(name, prompt, GREEDY, max_tokens, [], "sink", **kwargs)


def next_token(tokens):
    return 2 + sum(tokens) * 31 % 97


class FakeWorkers:
    """Keeps "KV" as the token written in each slot, and checks that every plan can be computed from it."""

    def __init__(self, page_size):
        self.page_size = page_size
        self.slots: dict[int, int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        tokens, pages = iter(unpack_int32(plan.tokens).tolist()), iter(unpack_int32(plan.pages).tolist())
        contexts = []
        for cached, new, num_pages in zip(plan.num_cached, plan.num_new, plan.num_pages):
            table = [next(pages) for _ in range(num_pages)]
            slots = [
                table[i // self.page_size] * self.page_size + i % self.page_size for i in range(cached + new)
            ]
            for slot in slots[cached:]:
                self.slots[slot] = next(tokens)
            contexts.append([self.slots[slot] for slot in slots])
        for spec in plan.samples:
            assert spec.position == len(contexts[spec.index])
        return StepResult(plan.epoch, plan.step, [next_token(contexts[s.index]) for s in plan.samples])


def expected(prompt, max_tokens, limit=64):
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] == 1:
            break
    return tokens[len(prompt) :]
