"""The `stripe` skill, first part: create, read, list and search records with a `StripeClient`."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import METADATA_KEYS, PAGE_SIZES

FAMILIES = (
    Family(
        name="create_customer",
        choices={
            "verb": ("create", "add", "register", "new"),
            "field": ("name", "phone", "description"),
            "key": METADATA_KEYS,
        },
        phrasings=(
            "Write ${verb}_customer(client, email, $field, $key) that creates a Stripe customer with $key "
            "in the metadata and returns its id.",
            "With a StripeClient, define ${verb}_customer(client, email, $field, $key): email and $field "
            "are customer fields, $key goes into metadata. Return the id.",
            "How do I save a customer in Stripe with email, $field and a metadata entry $key? Call it "
            "${verb}_customer and return the id.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_customer(client: StripeClient, email, $field, $key):
                customer = client.v1.customers.create(
                    params={"email": email, "$field": $field, "metadata": {"$key": $key}}
                )
                return customer.id
        """,
    ),
    Family(
        name="retrieve_value",
        choices={
            "kind|value": (
                "customer|email",
                "customer|name",
                "customer|balance",
                "charge|amount_refunded",
                "charge|receipt_url",
                "dispute|reason",
                "dispute|status",
                "invoice|amount_due",
                "invoice|hosted_invoice_url",
                "invoice|status",
                "payment_intent|amount",
                "payment_intent|client_secret",
                "payment_intent|status",
                "price|unit_amount",
                "product|name",
                "refund|status",
                "subscription|status",
            ),
            "verb": ("fetch", "get", "load", "read", "retrieve"),
        },
        phrasings=(
            "Write ${verb}_${kind}_$value(client, ${kind}_id) that retrieves the Stripe $kind and returns its $value.",
            "Define ${verb}_${kind}_$value(client, ${kind}_id) with a StripeClient: look the $kind up by "
            "id, return $value.",
            "I have a ${kind}_id from Stripe and need $value. Name the function ${verb}_${kind}_$value.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_${kind}_$value(client: StripeClient, ${kind}_id):
                $kind = client.v1.${kind}s.retrieve(${kind}_id)
                return $kind.$value
        """,
    ),
    Family(
        name="update_metadata",
        choices={
            "kind": ("customer", "product", "subscription", "payment_intent", "charge", "invoice"),
            "key": METADATA_KEYS,
            "verb": ("tag", "mark", "label"),
        },
        phrasings=(
            "Write ${verb}_$kind(client, ${kind}_id, $key) that stores $key in the metadata of a Stripe "
            "$kind and returns the updated $kind.",
            "Define ${verb}_$kind(client, ${kind}_id, $key): update the $kind so that its metadata holds $key.",
            "Set metadata $key on an existing $kind with the stripe library, as ${verb}_$kind(client, "
            "${kind}_id, $key).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_$kind(client: StripeClient, ${kind}_id, $key):
                return client.v1.${kind}s.update(
                    ${kind}_id,
                    params={"metadata": {"$key": $key}},
                )
        """,
    ),
    Family(
        name="auto_paging",
        choices={
            "kind|value": (
                "customer|email",
                "customer|name",
                "product|name",
                "price|unit_amount",
                "invoice|number",
                "invoice|total",
                "charge|amount",
                "refund|amount",
                "coupon|name",
                "payout|arrival_date",
            ),
            "verb": ("list", "collect", "all"),
            "limit": PAGE_SIZES,
        },
        phrasings=(
            "Write ${verb}_${kind}_${value}s(client) that pages through all Stripe ${kind}s, $limit per "
            "request, and returns a list of their $value.",
            "Define ${verb}_${kind}_${value}s(client) using auto_paging_iter with limit $limit: the $value "
            "of every $kind.",
            "How do I get $value of all my ${kind}s from Stripe, not only the first page? Use limit $limit; "
            "function ${verb}_${kind}_${value}s(client).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_${kind}_${value}s(client: StripeClient):
                ${kind}s = client.v1.${kind}s.list(params={"limit": $limit})
                return [$kind.$value for $kind in ${kind}s.auto_paging_iter()]
        """,
    ),
    Family(
        name="list_for_customer",
        choices={
            "kind": ("charge", "invoice", "payment_intent", "subscription", "payment_method", "credit_note"),
            "verb": ("list", "recent", "find", "customer"),
            "limit": PAGE_SIZES,
        },
        phrasings=(
            "Write ${verb}_${kind}s(client, customer_id) that returns at most $limit ${kind}s of a Stripe "
            "customer as a list.",
            "Define ${verb}_${kind}s(client, customer_id): the first $limit ${kind}s of that customer, from "
            "a StripeClient.",
            "Show me up to $limit ${kind}s that belong to one customer in Stripe; name it "
            "${verb}_${kind}s(client, customer_id).",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_${kind}s(client: StripeClient, customer_id):
                page = client.v1.${kind}s.list(
                    params={"customer": customer_id, "limit": $limit},
                )
                return page.data
        """,
    ),
    Family(
        name="search_by_metadata",
        choices={
            "kind": ("customer", "product", "subscription", "payment_intent", "charge", "invoice", "price"),
            "key": METADATA_KEYS,
            "verb": ("find", "search"),
        },
        phrasings=(
            "Write ${verb}_${kind}s(client, $key) that uses the Stripe search API to return the ids of "
            "${kind}s whose metadata $key has that value.",
            "Define ${verb}_${kind}s(client, $key): search ${kind}s by metadata['$key'] and return a list of ids.",
            "Find every $kind in Stripe by its $key metadata with a search query. Function "
            "${verb}_${kind}s(client, $key), returns ids.",
        ),
        solution="""
            from stripe import StripeClient


            def ${verb}_${kind}s(client: StripeClient, $key):
                query = f"metadata['$key']:'{$key}'"
                result = client.v1.${kind}s.search(params={"query": query})
                return [$kind.id for $kind in result.auto_paging_iter()]
        """,
    ),
)
