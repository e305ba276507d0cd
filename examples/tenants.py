"""Two tenants: one sends sixteen prompts at once, the other asks one question after that.

millrace serve --policy fair_share     # goes by tenant; --policy priority goes by priority
python examples/tenants.py [HOST:PORT]
"""

import asyncio
import sys

from millrace.client import AsyncClient
from millrace.client.errors import of_failure

target = sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"
BATCH = {"tenant": "batch", "priority": 5, "max_tokens": 24, "ignore_eos": True}
DESK = {"tenant": "desk", "priority": 0, "max_tokens": 6, "temperature": 0}  # 0: most urgent


async def main() -> None:
    async with AsyncClient(target) as client:
        connection = client.connect()
        for number in range(16):
            await connection.submit(f"Fact {number} about the sea:", **BATCH)
        await connection.done()

        question = client.generate("The capital of France is", **DESK)
        answer = asyncio.create_task(question.read())
        num_ended = num_before = 0
        async for result in connection:
            if result.HasField("failure"):
                raise of_failure(result.failure)
            num_ended += result.response.HasField("summary")
            if not answer.done():
                num_before = num_ended
        print(f"desk: {await answer!r} after {num_before} of batch's {num_ended} answers")


asyncio.run(main())
