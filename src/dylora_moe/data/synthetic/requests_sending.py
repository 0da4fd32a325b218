"""The `requests` skill, second half: change a resource, move files, keep a session, wait and retry."""

from dylora_moe.data.synthetic.family import Family
from dylora_moe.data.synthetic.words import HOSTS, NOUNS, OTHER_FIELDS, READ_VERBS, TEXT_FIELDS, TIMEOUTS_S

_PLACE = {"host": HOSTS, "noun": NOUNS}
_THINGS = ("archive", "avatar", "backup", "dataset", "image", "logo", "manual", "recording", "scan", "video")

FAMILIES = (
    Family(
        name="post_json",
        choices=_PLACE | {"first": TEXT_FIELDS, "second": OTHER_FIELDS},
        phrasings=(
            "Write create_$noun($first, $second) that POSTs both values as JSON to $host/${noun}s and "
            "returns the id of the new $noun.",
            "How do I add a $noun over HTTP? create_$noun($first, $second) should send JSON to "
            "$host/${noun}s and give back the id.",
            "With requests, POST $first and $second as a JSON body to $host/${noun}s in create_$noun and "
            "return the id from the reply.",
        ),
        solution="""
            import requests


            def create_$noun($first, $second):
                payload = {"$first": $first, "$second": $second}
                response = requests.post("$host/${noun}s", json=payload, timeout=10)
                response.raise_for_status()
                return response.json()["id"]
        """,
    ),
    Family(
        name="change_one",
        choices=_PLACE
        | {"verb|method": ("replace|put", "update|patch", "edit|patch"), "field": TEXT_FIELDS + OTHER_FIELDS},
        phrasings=(
            "Write ${verb}_$noun(${noun}_id, $field) that sends a $method request with the JSON $field to "
            "$host/${noun}s and returns the decoded reply.",
            "Define ${verb}_$noun(${noun}_id, $field) using requests.$method: change $field of a $noun at "
            "$host/${noun}s.",
            "I need to set the $field of an existing $noun with $method. Endpoint $host/${noun}s, function "
            "${verb}_$noun(${noun}_id, $field).",
        ),
        solution="""
            import requests


            def ${verb}_$noun(${noun}_id, $field):
                url = f"$host/${noun}s/{${noun}_id}"
                response = requests.$method(url, json={"$field": $field}, timeout=10)
                response.raise_for_status()
                return response.json()
        """,
    ),
    Family(
        name="delete_one",
        choices=_PLACE | {"verb": ("delete", "remove", "drop"), "code": ("200", "202", "204")},
        phrasings=(
            "Write ${verb}_$noun(${noun}_id) that deletes the $noun at $host/${noun}s and returns whether "
            "the status was $code.",
            "Define ${verb}_$noun(${noun}_id) with requests.delete on $host/${noun}s; True means $code.",
            "Send DELETE for a $noun to $host/${noun}s in ${verb}_$noun(${noun}_id) and tell me if the "
            "server answered $code.",
        ),
        solution="""
            import requests


            def ${verb}_$noun(${noun}_id):
                response = requests.delete(f"$host/${noun}s/{${noun}_id}", timeout=10)
                return response.status_code == $code
        """,
    ),
    Family(
        name="upload_file",
        choices={"host": HOSTS, "thing": _THINGS, "field": ("file", "upload", "attachment", "content")},
        phrasings=(
            "Write upload_$thing(path) that posts the file as multipart field $field to $host/uploads and "
            "returns the url in the reply.",
            "Define upload_$thing(path) with requests: multipart upload to $host/uploads, form field "
            "$field, return the JSON value url.",
            "How can I upload a $thing? Send it as $field to $host/uploads in upload_$thing(path) and return its url.",
        ),
        solution="""
            import requests


            def upload_$thing(path):
                with open(path, "rb") as file:
                    response = requests.post(
                        "$host/uploads",
                        files={"$field": file},
                        timeout=60,
                    )
                response.raise_for_status()
                return response.json()["url"]
        """,
    ),
    Family(
        name="download_stream",
        choices={
            "verb": ("download", "save", "fetch"),
            "thing": _THINGS,
            "chunk": ("1024", "4096", "8192", "65536"),
            "timeout": TIMEOUTS_S,
        },
        phrasings=(
            "Write ${verb}_$thing(url, path) that streams the response to a file in chunks of $chunk bytes, "
            "timeout $timeout seconds.",
            "Define ${verb}_$thing(url, path) with requests; don't load it into memory, write $chunk byte "
            "chunks. Use timeout=$timeout.",
            "I have a large $thing behind a url. Give me ${verb}_$thing(url, path) that streams it to disk, "
            "chunk size $chunk, timeout $timeout.",
        ),
        solution="""
            import requests


            def ${verb}_$thing(url, path):
                with requests.get(url, stream=True, timeout=$timeout) as response:
                    response.raise_for_status()
                    with open(path, "wb") as file:
                        for chunk in response.iter_content(chunk_size=$chunk):
                            file.write(chunk)
        """,
    ),
    Family(
        name="session_login",
        choices=_PLACE | {"path": ("login", "signin", "auth/login"), "user": ("email", "username")},
        phrasings=(
            "Write fetch_${noun}s($user, password): log in with a form POST to $host/$path, keep the "
            "cookies in a session, then GET $host/${noun}s and return the JSON.",
            "Define fetch_${noun}s($user, password) with requests.Session: first post $user and password to "
            "$host/$path, then read $host/${noun}s.",
            "The ${noun}s at $host/${noun}s need a login cookie from $host/$path. Write "
            "fetch_${noun}s($user, password).",
        ),
        solution="""
            import requests


            def fetch_${noun}s($user, password):
                with requests.Session() as session:
                    form = {"$user": $user, "password": password}
                    login = session.post("$host/$path", data=form, timeout=10)
                    login.raise_for_status()
                    response = session.get("$host/${noun}s", timeout=10)
                    response.raise_for_status()
                    return response.json()
        """,
    ),
    Family(
        name="session_with_retries",
        choices={
            "function": ("make_session", "build_session", "create_session", "retrying_session"),
            "total": ("2", "3", "4", "5", "6"),
            "backoff": ("0.1", "0.2", "0.5", "1"),
            "codes": ("429, 503", "502, 503", "502, 503, 504", "500, 502, 503", "429, 500, 503"),
        },
        phrasings=(
            "Write $function() that returns a requests session which retries https calls up to $total times "
            "on status $codes with a backoff factor of $backoff.",
            "Define $function(): a requests.Session with an HTTPAdapter, $total retries, backoff $backoff, "
            "for the codes $codes.",
            "How do I retry on $codes with requests? I want $total retries and backoff factor $backoff, in "
            "a function $function.",
        ),
        solution="""
            import requests
            from requests.adapters import HTTPAdapter
            from urllib3.util.retry import Retry


            def $function():
                retry = Retry(total=$total, backoff_factor=$backoff, status_forcelist=[$codes])
                session = requests.Session()
                session.mount("https://", HTTPAdapter(max_retries=retry))
                return session
        """,
    ),
    Family(
        name="wait_when_limited",
        choices=_PLACE | {"verb": READ_VERBS} | {"attempts": ("3", "4", "5"), "delay": ("1", "2", "5")},
        phrasings=(
            "Write ${verb}_${noun}s() that tries $host/${noun}s up to $attempts times and, on status 429, "
            "sleeps Retry-After seconds ($delay if absent).",
            "Define ${verb}_${noun}s() for the rate limited $host/${noun}s: $attempts attempts, wait for "
            "Retry-After on 429, default $delay.",
            "How do I respect Retry-After? ${verb}_${noun}s() should GET $host/${noun}s, at most $attempts "
            "tries, sleeping $delay seconds without the header.",
        ),
        solution="""
            import time

            import requests


            def ${verb}_${noun}s():
                for _ in range($attempts):
                    response = requests.get("$host/${noun}s", timeout=10)
                    if response.status_code != 429:
                        response.raise_for_status()
                        return response.json()
                    time.sleep(int(response.headers.get("Retry-After", $delay)))
                raise RuntimeError("too many requests")
        """,
    ),
)
