"""Each family of the `stripe` skill, run: the real library builds the requests, a client of ours answers."""

import functools
import hashlib
import hmac
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest

from dylora_moe.data.synthetic import families

stripe = pytest.importorskip("stripe")


class Call(NamedTuple):
    method: str
    path: str
    parameters: dict[str, str]


class FakeStripe(stripe.HTTPClient):
    """Records what the library would send and answers from a queue."""

    name = "fake"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.headers: list[Mapping[str, str]] = []
        self.answers: list[tuple[int, dict[str, Any]]] = []

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        self.answers.append((status, body))

    def request(self, method: str, url: str, headers: Any, post_data: Any = None, **_: Any) -> Any:
        address = urlsplit(url)
        assert (address.scheme, address.netloc) == ("https", "api.stripe.com")
        self.calls.append(Call(method, address.path, dict(parse_qsl(address.query) + parse_qsl(post_data or ""))))
        self.headers.append(headers)
        status, body = self.answers.pop(0)
        return json.dumps(body), status, {}


class Task(NamedTuple):
    code: dict[str, Any]
    words: Mapping[str, str]

    def function(self, template: str) -> Callable[..., Any]:
        return self.code[template.format(**self.words)]


@pytest.fixture(params=range(3))
def task(request: pytest.FixtureRequest) -> Task:
    """A drawn answer of the family that the test is named after, executed."""
    name = request.function.__name__.removeprefix("test_")
    family = next(family for family in families("stripe") if family.name == name)
    draft = family.build(random.Random(request.param))
    code: dict[str, Any] = {}
    exec(compile(draft.answer, name, "exec"), code)
    return Task(code=code, words=draft.parameters)


@pytest.fixture
def fake() -> Iterator[FakeStripe]:
    fake = FakeStripe()
    yield fake
    assert not fake.answers, "fewer requests were made than answers prepared"


@pytest.fixture
def client(fake: FakeStripe) -> Any:
    return stripe.StripeClient("sk_test_1", http_client=fake)


def listing(path: str, *entries: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"object": "list", "url": path, "data": list(entries), "has_more": has_more}


def test_every_family_is_run():
    assert {f"test_{family.name}" for family in families("stripe")} <= set(globals())


def test_create_customer(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "cus_1", "object": "customer"})

    assert task.function("{verb}_customer")(client, "ann@example.com", "Ann", "k7") == "cus_1"
    sent = {"email": "ann@example.com", task.words["field"]: "Ann", f"metadata[{task.words['key']}]": "k7"}
    assert fake.calls == [Call("post", "/v1/customers", sent)]


def test_retrieve_value(task: Task, client: Any, fake: FakeStripe):
    kind, value = task.words["kind"], task.words["value"]
    fake.answer({"id": "x_1", "object": kind, value: "wanted"})

    assert task.function("{verb}_{kind}_{value}")(client, "x_1") == "wanted"
    assert fake.calls == [Call("get", f"/v1/{kind}s/x_1", {})]


def test_update_metadata(task: Task, client: Any, fake: FakeStripe):
    kind, key = task.words["kind"], task.words["key"]
    fake.answer({"id": "x_1", "object": kind, "metadata": {key: "v"}})

    updated = task.function("{verb}_{kind}")(client, "x_1", "v")

    assert updated.metadata[key] == "v"
    assert fake.calls == [Call("post", f"/v1/{kind}s/x_1", {f"metadata[{key}]": "v"})]


def test_auto_paging(task: Task, client: Any, fake: FakeStripe):
    kind, value, limit = (task.words[name] for name in ("kind", "value", "limit"))
    path = f"/v1/{kind}s"
    entries = [{"id": f"x_{number}", "object": kind, value: number} for number in range(3)]
    fake.answer(listing(path, *entries[:2], has_more=True))
    fake.answer(listing(path, entries[2]))

    assert task.function("{verb}_{kind}_{value}s")(client) == [0, 1, 2]
    assert fake.calls == [
        Call("get", path, {"limit": limit}),
        Call("get", path, {"limit": limit, "starting_after": "x_1"}),
    ]


def test_list_for_customer(task: Task, client: Any, fake: FakeStripe):
    kind, path = task.words["kind"], f"/v1/{task.words['kind']}s"
    fake.answer(listing(path, {"id": "x_1", "object": kind}, has_more=True))

    found = task.function("{verb}_{kind}s")(client, "cus_1")

    assert [entry.id for entry in found] == ["x_1"]
    assert fake.calls == [Call("get", path, {"customer": "cus_1", "limit": task.words["limit"]})]


def test_search_by_metadata(task: Task, client: Any, fake: FakeStripe):
    kind, query = task.words["kind"], f"metadata['{task.words['key']}']:'k7'"
    path = f"/v1/{kind}s/search"
    page = {"object": "search_result", "url": path, "data": [{"id": "x_1", "object": kind}]}
    fake.answer(page | {"has_more": True, "next_page": "p2"})
    fake.answer(page | {"has_more": False, "next_page": None})

    assert task.function("{verb}_{kind}s")(client, "k7") == ["x_1", "x_1"]
    following = {"query": query, "page": "p2"}
    assert fake.calls == [Call("get", path, {"query": query}), Call("get", path, following)]


def test_create_payment_intent(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "pi_1", "object": "payment_intent", "client_secret": "pi_1_secret"})

    assert task.function("{verb}_payment")(client, 1999, "k7") == "pi_1_secret"
    sent = {
        "amount": "1999",
        "currency": task.words["currency"],
        "automatic_payment_methods[enabled]": "true",
        f"metadata[{task.words['key']}]": "k7",
    }
    assert fake.calls == [Call("post", "/v1/payment_intents", sent)]


@pytest.mark.parametrize(("status", "expected"), [("succeeded", True), ("requires_action", False)])
def test_confirm_payment(task: Task, client: Any, fake: FakeStripe, status: str, expected: bool):
    fake.answer({"id": "pi_1", "object": "payment_intent", "status": status})

    assert task.function("{verb}_payment")(client, "pi_1") is expected
    page = f"https://example.com/{task.words['page']}"
    sent = {"payment_method": task.words["method"], "return_url": page}
    assert fake.calls == [Call("post", "/v1/payment_intents/pi_1/confirm", sent)]


def test_capture_payment(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "pi_1", "object": "payment_intent"})
    fake.answer({"id": "pi_1", "object": "payment_intent", "amount_received": 700})

    intent_id = task.function("{verb}")(client, 1000)
    captured = task.function("{second}")(client, intent_id, 700)

    assert captured.amount_received == 700
    sent = {"amount": "1000", "currency": task.words["currency"], "capture_method": "manual"}
    assert fake.calls == [
        Call("post", "/v1/payment_intents", sent),
        Call("post", "/v1/payment_intents/pi_1/capture", {"amount_to_capture": "700"}),
    ]


def test_cancel_payment(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "pi_1", "object": "payment_intent", "status": "canceled"})

    assert task.function("{verb}_{noun}")(client, "pi_1") == "canceled"
    sent = {"cancellation_reason": task.words["reason"]}
    assert fake.calls == [Call("post", "/v1/payment_intents/pi_1/cancel", sent)]


def test_refund(task: Task, client: Any, fake: FakeStripe):
    target = task.words["target"]
    fake.answer({"id": "re_1", "object": "refund"})

    assert task.function("refund_{target}")(client, "x_1", "k7") == "re_1"
    sent = {target: "x_1", "reason": task.words["reason"], f"metadata[{task.words['key']}]": "k7"}
    assert fake.calls == [Call("post", "/v1/refunds", sent)]


def test_refund_percentage(task: Task, client: Any, fake: FakeStripe):
    expected = 1999 * int(task.words["percent"]) // 100
    fake.answer({"id": "pi_1", "object": "payment_intent", "amount_received": 1999})
    fake.answer({"id": "re_1", "object": "refund", "amount": expected})

    assert task.function("{verb}_{noun}")(client, "pi_1") == expected
    assert fake.calls == [
        Call("get", "/v1/payment_intents/pi_1", {}),
        Call("post", "/v1/refunds", {"payment_intent": "pi_1", "amount": str(expected)}),
    ]


def test_idempotent_payment(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "pi_1", "object": "payment_intent"})

    assert task.function("{verb}_once")(client, 500, "cus_1", "k7") == "pi_1"
    sent = {"amount": "500", "currency": task.words["currency"], "customer": "cus_1"}
    assert fake.calls == [Call("post", "/v1/payment_intents", sent)]
    assert fake.headers[0]["Idempotency-Key"] == f"{task.words['verb']}-k7"


def test_card_error(task: Task, client: Any, fake: FakeStripe):
    texts = {"user_message": "Your card was declined.", "code": "card_declined", "decline_code": "lost_card"}
    error = {"type": "card_error", "message": texts["user_message"]}
    error |= {key: texts[key] for key in ("code", "decline_code")}
    fake.answer({"id": "pi_1", "object": "payment_intent"})
    fake.answer({"error": error}, status=402)
    fake.answer({"error": {"type": "invalid_request_error", "message": "No such method"}}, status=400)
    pay = task.function("{verb}")

    assert pay(client, 500, "pm_1") == ("pi_1", None)
    assert pay(client, 500, "pm_2") == (None, texts[task.words["value"]])
    with pytest.raises(stripe.InvalidRequestError):
        pay(client, 500, "pm_3")
    sent = {
        "amount": "500",
        "currency": task.words["currency"],
        "payment_method": "pm_1",
        "automatic_payment_methods[enabled]": "true",
        "automatic_payment_methods[allow_redirects]": "never",
        "confirm": "true",
    }
    assert fake.calls[0] == Call("post", "/v1/payment_intents", sent)


def test_product_with_price(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "prod_1", "object": "product"})
    fake.answer({"id": "price_1", "object": "price"})

    assert task.function("{verb}_{noun}")(client, "Pro", 900) == "price_1"
    sent = {
        "product": "prod_1",
        "unit_amount": "900",
        "currency": task.words["currency"],
        "recurring[interval]": task.words["interval"],
    }
    assert fake.calls == [Call("post", "/v1/products", {"name": "Pro"}), Call("post", "/v1/prices", sent)]


def test_create_subscription(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "sub_1", "object": "subscription", "status": "trialing"})

    assert task.function("{verb}")(client, "cus_1", "price_1", "k7") == "trialing"
    sent = {
        "customer": "cus_1",
        "items[0][price]": "price_1",
        "trial_period_days": task.words["days"],
        f"metadata[{task.words['key']}]": "k7",
    }
    assert fake.calls == [Call("post", "/v1/subscriptions", sent)]


def test_cancel_subscription(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "sub_1", "object": "subscription", "status": "canceled"})

    assert task.function("{verb}_{noun}")(client, "sub_1") == "canceled"
    sent = {"cancellation_details[feedback]": task.words["feedback"]}
    assert fake.calls == [Call("delete", "/v1/subscriptions/sub_1", sent)]


def test_cancel_at_period_end(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "sub_1", "object": "subscription", "cancel_at": 1_900_000_000})

    assert task.function("{verb}")(client, "sub_1", "k7") == 1_900_000_000
    sent = {"cancel_at_period_end": "true", f"metadata[{task.words['key']}]": "k7"}
    assert fake.calls == [Call("post", "/v1/subscriptions/sub_1", sent)]


def test_change_price(task: Task, client: Any, fake: FakeStripe):
    items = listing("/v1/subscription_items", {"id": "si_1", "object": "subscription_item"})
    fake.answer({"id": "sub_1", "object": "subscription", "items": items})
    fake.answer({"id": "sub_1", "object": "subscription", "status": "active"})

    assert task.function("{verb}_{noun}")(client, "sub_1", "price_2").status == "active"
    proration = task.words["proration"]
    sent = {"items[0][id]": "si_1", "items[0][price]": "price_2", "proration_behavior": proration}
    path = "/v1/subscriptions/sub_1"
    assert fake.calls == [Call("get", path, {}), Call("post", path, sent)]


def test_checkout_session(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "cs_1", "object": "checkout.session", "url": "https://checkout.stripe.com/c/1"})

    assert task.function("{verb}_checkout")(client, "price_1") == "https://checkout.stripe.com/c/1"
    sent = {
        "mode": task.words["mode"],
        "line_items[0][price]": "price_1",
        "line_items[0][quantity]": "1",
        "success_url": f"https://example.com/{task.words['success']}",
        "cancel_url": f"https://example.com/{task.words['cancel']}",
    }
    assert fake.calls == [Call("post", "/v1/checkout/sessions", sent)]


def test_webhook(task: Task, client: Any, fake: FakeStripe):
    def deliver(kind: str, key: str) -> Any:
        event = {"id": "evt_1", "object": "event", "type": kind, "data": {"object": {"id": "x_1"}}}
        payload, now = json.dumps(event), int(time.time())
        signature = hmac.new(key.encode(), f"{now}.{payload}".encode(), hashlib.sha256).hexdigest()
        handle = task.function("{verb}")
        return handle(client, payload.encode(), f"t={now},v1={signature}", "whsec_right")

    refused = {"None": None, "False": False}[task.words["status"]]
    assert deliver(task.words["event"], "whsec_right") == "x_1"
    assert deliver(task.words["event"], "whsec_wrong") is refused
    assert deliver("plan.created", "whsec_right") is refused
    assert fake.calls == []


def test_invoice(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "in_1", "object": "invoice"})
    fake.answer({"id": "ii_1", "object": "invoiceitem"})
    fake.answer({"id": "in_1", "object": "invoice", "hosted_invoice_url": "https://invoice.stripe.com/1"})

    url = task.function("{verb}_invoice")(client, "cus_1", 4200, "Repair")

    assert url == "https://invoice.stripe.com/1"
    days = task.words["days"]
    draft = {"customer": "cus_1", "collection_method": "send_invoice", "days_until_due": days}
    item = {"customer": "cus_1", "invoice": "in_1", "amount": "4200", "description": "Repair"}
    item["currency"] = task.words["currency"]
    assert fake.calls == [
        Call("post", "/v1/invoices", draft),
        Call("post", "/v1/invoiceitems", item),
        Call("post", "/v1/invoices/in_1/finalize", {}),
    ]


def test_billing_portal(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "bps_1", "object": "billing_portal.session", "url": "https://billing.stripe.com/1"})

    assert task.function("{verb}_{noun}")(client, "cus_1") == "https://billing.stripe.com/1"
    sent = {"customer": "cus_1", "return_url": f"https://example.com/{task.words['page']}"}
    assert fake.calls == [Call("post", "/v1/billing_portal/sessions", sent)]


def test_coupon(task: Task, client: Any, fake: FakeStripe):
    fake.answer({"id": "co_1", "object": "coupon"})

    assert task.function("{verb}_{noun}")(client, "Spring") == "co_1"
    sent = {"name": "Spring", "percent_off": task.words["percent"], "duration": task.words["duration"]}
    assert fake.calls == [Call("post", "/v1/coupons", sent)]


def test_connected_account(task: Task, client: Any, fake: FakeStripe):
    kind, path = task.words["kind"], f"/v1/{task.words['kind']}s"
    fake.answer(listing(path, {"id": "x_1", "object": kind}))

    found = task.function("{verb}_{kind}s")(client, "acct_1")

    assert [entry.id for entry in found] == ["x_1"]
    assert fake.calls == [Call("get", path, {"limit": task.words["limit"]})]
    assert fake.headers[0]["Stripe-Account"] == "acct_1"


def test_make_client(task: Task, fake: FakeStripe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(task.words["variable"], "sk_test_env")
    monkeypatch.setattr(stripe.HTTPClient, "INITIAL_DELAY", 0)
    monkeypatch.setattr(stripe.HTTPClient, "MAX_DELAY", 0)
    task.code["StripeClient"] = functools.partial(stripe.StripeClient, http_client=fake)
    retries = int(task.words["retries"])
    busy = (503, {"error": {"message": "busy"}})
    fake.answers += [busy] * retries
    fake.answer({"object": "balance", "livemode": False})

    client = task.function("{verb}")()

    assert isinstance(client, stripe.StripeClient)
    assert client.v1.balance.retrieve().livemode is False
    assert fake.calls == [Call("get", "/v1/balance", {})] * (retries + 1)
    fake.answers += [busy] * (retries + 1)
    with pytest.raises(stripe.APIError):
        client.v1.balance.retrieve()
    assert {headers["Authorization"] for headers in fake.headers} == {"Bearer sk_test_env"}
