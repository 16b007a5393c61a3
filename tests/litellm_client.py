"""LiteLLM as the tests use it: without a look beyond this machine, and leaving nothing open."""

import asyncio
import contextlib
import inspect
import os


@contextlib.contextmanager
def litellm_client():
    """The module, for its synchronous calls."""
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    import litellm

    litellm.suppress_debug_info = True
    # It asks for the thread's event loop; one that it had to make would never be closed.
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield litellm
    finally:
        for client in litellm.in_memory_llm_clients_cache.cache_dict.values():
            closing = client.close()
            if inspect.isawaitable(closing):
                loop.run_until_complete(closing)
        litellm.in_memory_llm_clients_cache.flush_cache()
        asyncio.set_event_loop(None)
        loop.close()
