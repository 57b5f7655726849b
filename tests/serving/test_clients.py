"""A real server: OpenAI's stock client, and schemathesis against its description."""

import openai
import pytest
import schemathesis
from fake_serving import FakeEngine, FakePool, wait_for
from hypothesis import HealthCheck, given, settings
from loopback import listening
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from test_answers import HELLO, TOKENIZER

from peft_from_scratch.serving.http.keys import Keys
from peft_from_scratch.serving.http.server import Options, application

KEY = "shop-0123456789abcdef"
FEW = settings(
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_the_stock_client_completes_chats_streams_lists_and_is_refused():
    pool = FakePool("a", "b")
    engine = FakeEngine(pool)
    keys = Keys({KEY: {"tenant": "shop", "adapters": ["a"]}})
    app = application(engine, pool, TOKENIZER, Options("tiny", keys=keys))
    with listening(app) as address:
        options = {"base_url": f"{address}/v1", "max_retries": 0}
        client = openai.OpenAI(api_key=KEY, **options)
        assert [card.id for card in client.models.list()] == ["tiny", "a"]
        assert client.models.retrieve("a").owned_by == "peft-from-scratch"
        got = client.completions.create(model="a", prompt="hello", n=2, logprobs=1)
        assert [choice.text for choice in got.choices] == ["a a a a"] * 2
        assert got.choices[0].finish_reason == "stop"
        assert got.choices[0].logprobs.token_logprobs == [-0.5] * 4
        chat = client.chat.completions.create
        got = chat(model="base:a", messages=HELLO, logprobs=True, top_logprobs=1)
        assert got.choices[0].message.content == "a a a a"
        assert got.choices[0].message.role == "assistant"
        assert got.choices[0].logprobs.content[0].top_logprobs[0].logprob == -1.0
        assert got.usage.total_tokens == got.usage.prompt_tokens + 4
        stream = chat(
            model="tiny",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
        )
        *parts, last = list(stream)
        words = "".join(part.choices[0].delta.content for part in parts)
        assert words == "base base base base" and last.usage.completion_tokens == 4
        with pytest.raises(openai.NotFoundError) as refused:
            chat(model="b", messages=HELLO)
        assert refused.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="tools"):
            chat(model="a", messages=HELLO, tools=[{"type": "function"}])
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(api_key="another", **options).models.list()
        engine.room = 0
        with pytest.raises(openai.RateLimitError) as full:
            chat(model="a", messages=HELLO)
        assert full.value.response.headers["retry-after"] == "7"
        engine.room = 64
        goes_away(client, engine)
    assert engine.closed


def goes_away(client, engine):
    """A client that leaves a real stream cancels its request."""
    engine.go.clear()
    before = len(engine.tickets)
    stream = client.completions.create(model="a", prompt="x", stream=True)
    assert wait_for(lambda: len(engine.tickets) > before)
    stream.close()
    assert wait_for(engine.tickets[-1].cancelled.is_set)
    engine.go.set()


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_that_the_description_allows_or_forbids_breaks_the_server(mode):
    statuses, pool = set(), FakePool("a")
    options = Options("tiny", allow_loading=True, adapters="none")
    app = application(FakeEngine(pool), pool, TOKENIZER, options)
    with listening(app) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        posts = schema.include(method="POST").get_all_operations()
        for operation in (result.ok() for result in posts):

            @settings(FEW, max_examples=8)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                response = case.call()
                statuses.add(response.status_code)
                case.validate_response(response, checks=[not_a_server_error])

            check()
    assert statuses & {400, 404} and max(statuses) < 500
