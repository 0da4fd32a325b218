"""A server with OpenAI's chat interface that answers at once, or fails as it is told to. A process of its own.

    python -m tests.generate.stub '{"faults": {"429": 0.1, "cut": 0.05}, "delay_s": 0.0, "seed": 0}'

It prints its port, then answers until it is ended. Faults, each with its share of the requests: `307`, `400`, `401`,
`429`, `500`, `slow` (no answer in time), `cut` (the connection ends in the middle), `malformed` (JSON that is none),
`empty` (no choices), `long` (cut at max_tokens), `english`, `until_told` (English until a request says what was wrong),
`same`. With `says` it answers just that; `retry_after` are the seconds that a 429 asks for; messages that hold `poison`
get a 500. `/requests` gives how many came.
"""

import asyncio
import json
import random
import sys
import zlib
from typing import Any

WORDS = """
il la un una casa libro scuola amico giorno tempo parola lingua verbo nome frase esempio
significa usiamo diciamo spesso quando perché molto bene ancora sempre insieme italiano facile
bella nuovo grande piccolo sera mattina strada città mare sole
""".split()  # noqa: SIM905


ENGLISH = "Here is the answer to your question in plain English words."
TEXTS = {"english": ENGLISH, "same": "La parola che cerchi si usa spesso quando parliamo di cose belle e grandi."}
RAW = {
    "400": (400, b"\x1b[31mno such parameter", ""),
    "307": (307, b"", "Location: http://elsewhere/\r\n"),
    "401": (401, b"no key", ""),
    "429": (429, b'{"error": "slow down"}', "Retry-After: {retry_after}\r\n"),
    "500": (500, b"oops", ""),
    "malformed": (200, b'{"choices": [{"message": {"content": "ha', ""),
    "empty": (200, b'{"choices": []}', ""),
}


def answer_of(body: dict[str, Any]) -> str:
    """Twelve Italian words that the messages and the seed decide."""
    draw = random.Random(zlib.crc32(json.dumps([body["messages"], body.get("seed")]).encode()))
    return " ".join(draw.choices(WORDS, k=12)) + "."


class Stub:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.faults, self.delay_s = settings.get("faults", {}), settings.get("delay_s", 0.0)
        self.poison = settings.get("poison")
        self.says, self.retry_after = settings.get("says"), settings.get("retry_after", 0.01)
        self.draw, self.requests = random.Random(settings.get("seed", 0)), 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
        raw = await reader.readexactly(length)
        if lines[0].startswith("GET /requests"):
            await send(writer, 200, str(self.requests).encode())
            return True
        self.requests += 1
        body = json.loads(raw)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        fault = "500" if self.poison and self.poison in json.dumps(body["messages"]) else self.choose()
        if fault == "slow":
            await asyncio.sleep(3600)
        if fault in RAW:
            status, content, headers = RAW[fault]
            await send(writer, status, content, headers.format(retry_after=self.retry_after))
            return True
        text = self.says or TEXTS.get(fault or "", answer_of(body))
        if fault == "until_told" and "did not pass" not in body["messages"][-1]["content"]:
            text = ENGLISH
        finish = "length" if fault == "long" else "stop"
        record = {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 14},
        }
        content = json.dumps(record).encode()
        if fault == "cut":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + content)
            await writer.drain()
            return False
        await send(writer, 200, content)
        return True

    def choose(self) -> str | None:
        at = self.draw.random()
        for fault, share in self.faults.items():
            at -= share
            if at < 0:
                return fault
        return None


async def send(writer: asyncio.StreamWriter, status: int, content: bytes, headers: str = "") -> None:
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content)
    await writer.drain()


async def main(settings: dict[str, Any]) -> None:
    stub = Stub(settings)
    server = await asyncio.start_server(stub.handle, "127.0.0.1", settings.get("port", 0), limit=2**24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
