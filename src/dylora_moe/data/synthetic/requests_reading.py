"""The `requests` skill, first half: read a resource, prove who asks, page through lists, expect failures."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import HOSTS, NOUNS, READ_VERBS, TIMEOUTS_S

_READ = {"host": HOSTS, "noun": NOUNS, "verb": READ_VERBS}
_PLACE = {"host": HOSTS, "noun": NOUNS}

FAMILIES = (
    Family(
        name="get_params",
        choices=_READ | {"field": ("status", "category", "owner", "country", "language", "tag", "city")},
        phrasings=(
            "Write ${verb}_${noun}s($field): GET $host/${noun}s with $field as a query parameter and return the JSON.",
            "Using requests, define ${verb}_${noun}s($field) that asks $host/${noun}s for the ${noun}s with "
            "that $field and returns the decoded body.",
            "I want to filter ${noun}s by $field. Give me ${verb}_${noun}s($field) that sends it in the "
            "query string to $host/${noun}s.",
        ),
        solution="""
            import requests


            def ${verb}_${noun}s($field):
                response = requests.get(
                    "$host/${noun}s",
                    params={"$field": $field},
                    timeout=10,
                )
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="bearer_token",
        choices=_READ,
        phrasings=(
            "Write ${verb}_$noun(${noun}_id, token) that reads one $noun from $host/${noun}s with a bearer token.",
            "The API at $host needs an Authorization: Bearer header. Define ${verb}_$noun(${noun}_id, "
            "token) for its /${noun}s endpoint and return the JSON.",
            "Use requests to GET a $noun by id from $host/${noun}s, sending the token as Bearer "
            "authorization. Call it ${verb}_$noun(${noun}_id, token).",
        ),
        solution="""
            import requests


            def ${verb}_$noun(${noun}_id, token):
                url = f"$host/${noun}s/{${noun}_id}"
                headers = {"Authorization": f"Bearer {token}"}
                response = requests.get(url, headers=headers, timeout=10)
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="api_key_from_environment",
        choices=_READ
        | {
            "header": ("X-API-Key", "X-Auth-Token", "Api-Key"),
            "variable": ("API_KEY", "SERVICE_KEY", "ACCESS_KEY"),
        },
        phrasings=(
            "Write ${verb}_${noun}s() that reads the key from the environment variable $variable, sends it "
            "in the $header header to $host/${noun}s and returns the JSON.",
            "Define ${verb}_${noun}s() with requests: GET $host/${noun}s, header $header set from "
            "os.environ $variable.",
            "My key is in $variable and $host/${noun}s wants it as $header. How would ${verb}_${noun}s() look?",
        ),
        solution="""
            import os

            import requests


            def ${verb}_${noun}s():
                headers = {"$header": os.environ["$variable"]}
                response = requests.get("$host/${noun}s", headers=headers, timeout=10)
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="basic_auth",
        choices=_READ | {"user": ("username", "user_name", "login")},
        phrasings=(
            "Write ${verb}_${noun}s($user, password) that GETs $host/${noun}s with HTTP basic auth and "
            "returns the JSON.",
            "$host/${noun}s is behind basic authentication. Define ${verb}_${noun}s($user, password) with requests.",
            "Use requests basic auth to read $host/${noun}s: ${verb}_${noun}s($user, password).",
        ),
        solution="""
            import requests


            def ${verb}_${noun}s($user, password):
                response = requests.get(
                    "$host/${noun}s",
                    auth=($user, password),
                    timeout=10,
                )
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="send_cookie",
        choices=_READ | {"cookie": ("session_id", "sid", "auth_token")},
        phrasings=(
            "Write ${verb}_${noun}s($cookie) that sends the cookie $cookie with a GET to $host/${noun}s and "
            "returns the JSON.",
            "Define ${verb}_${noun}s($cookie) with requests; the API at $host/${noun}s reads the $cookie cookie.",
            "Pass $cookie as a cookie to $host/${noun}s and return the decoded body: ${verb}_${noun}s($cookie).",
        ),
        solution="""
            import requests


            def ${verb}_${noun}s($cookie):
                cookies = {"$cookie": $cookie}
                response = requests.get("$host/${noun}s", cookies=cookies, timeout=10)
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="none_when_missing",
        choices=_READ,
        phrasings=(
            "Write ${verb}_$noun(${noun}_id) for $host/${noun}s that returns None when the $noun does not "
            "exist (404) and raises on other errors.",
            "Define ${verb}_$noun(${noun}_id): GET $host/${noun}s by id, None on status 404, otherwise the JSON.",
            "A missing $noun should not be an error. Make ${verb}_$noun(${noun}_id) return None on 404 from "
            "$host/${noun}s.",
        ),
        solution="""
            import requests


            def ${verb}_$noun(${noun}_id):
                response = requests.get(f"$host/${noun}s/{${noun}_id}", timeout=10)
                if response.status_code == 404:
                    return None
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="fallback_on_failure",
        choices=_READ | {"timeout": TIMEOUTS_S, "fallback": ("None", "[]", "{}")},
        phrasings=(
            "Write ${verb}_${noun}s() for $host/${noun}s with a timeout of $timeout seconds that returns "
            "$fallback when the request fails.",
            "Define ${verb}_${noun}s(): GET $host/${noun}s, give up after $timeout seconds, and return "
            "$fallback on any requests error instead of raising.",
            "I need a safe ${verb}_${noun}s() that never raises: JSON of $host/${noun}s, or $fallback if "
            "the call fails or takes over $timeout seconds.",
        ),
        solution="""
            import requests


            def ${verb}_${noun}s():
                try:
                    response = requests.get("$host/${noun}s", timeout=$timeout)
                    response.raise_for_status()
                    return response.json()
                except requests.RequestException:
                    return $fallback
        """,
    ),
    Family(
        name="head_header",
        choices=_READ | {"header": ("ETag", "Last-Modified", "Content-Type", "Content-Length")},
        phrasings=(
            "Write ${verb}_${noun}_header(${noun}_id) that sends a HEAD request to $host/${noun}s for the "
            "$noun and returns its $header header.",
            "Without downloading the body, get $header of a $noun at $host/${noun}s. Name it "
            "${verb}_${noun}_header(${noun}_id).",
            "Define ${verb}_${noun}_header(${noun}_id) with requests.head on $host/${noun}s; return $header or None.",
        ),
        solution="""
            import requests


            def ${verb}_${noun}_header(${noun}_id):
                url = f"$host/${noun}s/{${noun}_id}"
                response = requests.head(url, allow_redirects=True, timeout=10)
                response.raise_for_status()
                return response.headers.get("$header")
        """,
    ),
    Family(
        name="paginate_by_number",
        choices=_PLACE | {"size": ("20", "25", "50", "100"), "size_name": ("per_page", "limit", "page_size")},
        phrasings=(
            "Write fetch_all_${noun}s() that walks the pages of $host/${noun}s (page, $size_name=$size) "
            "until an empty one and returns all ${noun}s.",
            "$host/${noun}s is paginated with page and $size_name. Define fetch_all_${noun}s() that "
            "collects everything, $size at a time.",
            "Collect all ${noun}s from $host/${noun}s in fetch_all_${noun}s(): start at page 1, $size_name "
            "is $size, stop at an empty page.",
        ),
        solution="""
            import requests


            def fetch_all_${noun}s():
                ${noun}s = []
                page = 1
                while True:
                    params = {"page": page, "$size_name": $size}
                    response = requests.get("$host/${noun}s", params=params, timeout=10)
                    response.raise_for_status()
                    batch = response.json()
                    if not batch:
                        return ${noun}s
                    ${noun}s.extend(batch)
                    page += 1
        """,
    ),
    Family(
        name="paginate_by_next",
        choices=_PLACE | {"items": ("results", "items", "data", "records"), "next": ("next", "next_url")},
        phrasings=(
            "Write a generator iter_${noun}s() for $host/${noun}s: yield the entries of $items on each page "
            "and follow $next until it is null.",
            "Define iter_${noun}s() with requests. Pages of $host/${noun}s hold $items and a link in $next; "
            "yield every $noun.",
            "How do I iterate over a cursor API? iter_${noun}s() starts at $host/${noun}s, yields from "
            "$items and continues at the $next url.",
        ),
        solution="""
            import requests


            def iter_${noun}s():
                url = "$host/${noun}s"
                while url:
                    response = requests.get(url, timeout=10)
                    response.raise_for_status()
                    page = response.json()
                    yield from page["$items"]
                    url = page["$next"]
        """,
    ),
)
