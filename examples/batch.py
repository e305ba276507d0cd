"""Many prompts at once on one Connect stream: the high-throughput way in.

python examples/batch.py [HOST:PORT]
"""

import asyncio
import sys

from millrace.client import AsyncClient
from millrace.client.errors import of_failure

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
COUNTRIES = ["France", "Japan", "Peru", "Kenya", "Norway", "Egypt", "Canada", "India"]


async def main() -> None:
    async with AsyncClient(target) as client:
        connection = client.connect()
        for country in COUNTRIES:
            prompt = f"The capital of {country} is"
            await connection.submit(prompt, request_id=country, max_tokens=8, temperature=0)
        await connection.done()

        texts = dict.fromkeys(COUNTRIES, "")
        async for result in connection:  # a few at a time, in whatever order they come
            if result.HasField("failure"):  # of this request alone; the stream goes on
                raise of_failure(result.failure)
            for output in result.response.outputs:
                texts[result.response.request_id] += output.text
    for country, text in texts.items():
        print(f"{country}: {text.strip()!r}")


asyncio.run(main())
