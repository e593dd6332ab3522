"""A Hub for the tests: the part of huggingface.co's protocol that stock clients speak, in memory, without Xet.

    with HubServer() as hub:
        environment = hub.environment(fresh_folder)  # for a client in a process of its own
        ...
        assert hub.repo("tester/name").files["config.json"]

It keeps a log of every request and misbehaves on demand: see `break_requests` and `on_request`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

USER, DATE = "tester", "2026-01-01T00:00:00.000Z"
WRITE_TOKEN, READ_TOKEN = "hf_testMayWriteEverything", "hf_testMayOnlyRead"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".model", ".png")
LFS_BYTES = 10 * 2**20  # larger files go to LFS whatever their name


class Refusal(Exception):
    """An answer that is an error: status, code and message as the Hub words them."""


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The hash that git knows the file by; of an LFS file git holds a pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        """What listings say of it, in the words of all of them."""
        found = {"type": "file", "path": path, "rfilename": path, "oid": self.oid, "blobId": self.oid}
        lfs = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 130}
        return found | {"size": len(self.data)} | ({"lfs": lfs} if self.lfs else {})


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def commit(self, branch: str, title: str, files: dict[str, File]) -> str:
        tree = sorted((path, file.oid) for path, file in files.items())
        oid = hashlib.sha1(json.dumps([branch, len(self.branches[branch]), title, tree]).encode()).hexdigest()
        self.branches[branch].append(Commit(oid, title, files))
        return oid

    def at(self, revision: str | None) -> Commit:
        revision = unquote(revision or "main")
        for branch, commits in self.branches.items():
            for commit in commits:
                if revision == commit.oid or (revision == branch and commit is commits[-1]):
                    return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    @property
    def files(self) -> dict[str, bytes]:
        """What is on the main branch."""
        return {path: file.data for path, file in self.at("main").files.items()}

    @property
    def titles(self) -> list[str]:
        """Of the commits of the main branch, oldest first."""
        return [commit.title for commit in self.branches["main"]]


@dataclass
class Request:
    method: str
    path: str
    status: int
    bytes: int  # of the body that was sent


class HubServer(ThreadingHTTPServer):
    """The server; a context manager that serves while it is open."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("models", "datasets") and name
        self.blobs: dict[str, bytes] = {}  # of LFS, by sha256; they stay when a commit fails, as on the Hub
        self.requests: list[Request] = []
        self.roles = {WRITE_TOKEN: "write", READ_TOKEN: "read"}
        self.faults: list[dict] = []
        self.connections_to_drop = 0  # the next connections, which are closed before the request is read
        self.on_request: Callable[[HubServer, str], None] | None = None  # called first, with "METHOD /path"
        self.lock = threading.RLock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def verify_request(self, request, client_address) -> bool:
        """Close the connection without an answer while `connections_to_drop` is positive."""
        if self.connections_to_drop:
            self.connections_to_drop -= 1
            return False
        return True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """Environment of a client; `home` is a fresh folder, since a cache would hide what is downloaded."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        more = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        return kept | more | {"NO_PROXY": "127.0.0.1"} | ({"HF_TOKEN": token} if token else {})

    def repo(self, name: str, kind: str = "models") -> Repo:
        return self.repos[kind, name]

    def create(self, name: str, kind: str = "models", private: bool = False) -> Repo:
        self.repos[kind, name] = repo = Repo(private)
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        return repo

    def break_requests(self, pattern: str, status: int = 500, after: int = 0, times: float = float("inf")) -> None:
        """Answer `status` to requests "METHOD /path" that match, `times` of them, once `after` went through."""
        self.faults.append({"pattern": pattern, "status": status, "after": after, "times": times})

    def check_faults(self, request: str) -> None:
        for fault in self.faults:
            if re.search(fault["pattern"], request):
                if fault["after"]:
                    fault["after"] -= 1
                elif fault["times"]:
                    fault["times"] -= 1
                    raise Refusal(fault["status"], "", "out of order")

    def sent(self, pattern: str = "") -> list[Request]:
        """The requests "METHOD /path" that match."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def handle_request(self) -> None:
        self.body = self.read_body()
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        with self.server.lock:
            try:
                if self.server.on_request:
                    self.server.on_request(self.server, f"{self.command} {address.path}")
                self.server.check_faults(f"{self.command} {address.path}")
                for methods, pattern, action, needs in ROUTES:
                    if self.command in methods and (match := re.fullmatch(pattern, address.path)):
                        self.check_token(needs)
                        return action(self, **match.groupdict())
                raise Refusal(404, "EntryNotFound", f"no route for {self.command} {address.path}")
            except Refusal as refusal:
                status, code, message = refusal.args
                self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def json(self):
        return json.loads(self.body or b"{}")

    def reply(self, value=None, status: int = 200, headers: dict | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps({} if value is None else value).encode()
        self.server.requests.append(Request(self.command, self.path, status, len(self.body)))
        self.send_response(status)
        headers = {"Content-Type": "application/json"} | (headers or {}) | {"Content-Length": len(data)}
        for key, content in headers.items():
            self.send_header(key, str(content))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def check_token(self, needs: str | None) -> None:
        """`needs` is None, "read" or "write"."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.role = self.server.roles.get(token)
        if token and not self.role:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if needs and not self.role:
            raise Refusal(401, "", "Invalid username or password.")
        if needs == "write" and self.role != "write":
            raise Refusal(403, "", "Forbidden: you must use a write token to upload to a repository.")

    def find(self, kind: str | None, name: str) -> Repo:
        """The repository; a private one does not exist for those without a token."""
        repo = self.server.repos.get(((kind or "models").rstrip("/"), name))
        if repo is None or (repo.private and not self.role):
            raise Refusal(404 if self.role else 401, "RepoNotFound", "Repository not found")
        return repo

    # --- Accounts and repositories ----------------------------------------------------------------------------------

    def whoami(self):
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
        self.reply({"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "auth": auth})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        kind = f"{self.json.get('type') or 'model'}s"
        name = f"{self.json.get('organization') or USER}/{self.json['name']}"
        if not name.startswith(f"{USER}/"):
            raise Refusal(403, "", f"You don't have the rights to create a model under the namespace of {name}")
        known = (kind, name) in self.server.repos
        if not known:
            self.server.create(name, kind, self.json.get("visibility") == "private" or bool(self.json.get("private")))
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{name}"
        self.reply({"url": url, "name": name, "id": name}, 409 if known else 200)

    def info(self, kind, name, revision=None):
        repo = self.find(kind, name)
        commit = repo.at(revision)
        files = [file.entry(path) for path, file in sorted(commit.files.items())]
        self.reply(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "tags": [],
                "author": USER,
                "downloads": 0,
                "likes": 0,
                "gated": False,
                "disabled": False,
                "createdAt": DATE,
                "lastModified": DATE,
                "siblings": files,
            }
        )

    def refs(self, kind, name):
        branches = self.find(kind, name).branches
        heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1].oid} for n, c in branches.items()]
        self.reply({"branches": heads, "tags": [], "converts": [], "pullRequests": []})

    def branch(self, kind, name, branch):
        repo = self.find(kind, name)
        if unquote(branch) in repo.branches:
            raise Refusal(409, "", "Reference already exists")
        repo.branches[unquote(branch)] = [repo.at(self.json.get("startingPoint"))]
        self.reply()

    # --- Reading ----------------------------------------------------------------------------------------------------

    def tree(self, kind, name, revision, folder=None):
        prefix, listed = f"{unquote(folder)}/" if folder else "", {}
        deep = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        for path, file in sorted(self.find(kind, name).at(revision).files.items()):
            if path.startswith(prefix):
                first, inside, _ = path[len(prefix) :].partition("/")
                if inside:
                    listed[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40, "size": 0}
                if deep or not inside:
                    listed[path] = file.entry(path)
        if prefix and not listed:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self.reply(list(listed.values()))

    def paths_info(self, kind, name, revision):
        files = self.find(kind, name).at(revision).files
        form = "urlencoded" in self.headers.get("Content-Type", "")
        asked = (parse_qs(self.body.decode()) if form else self.json).get("paths", [])
        self.reply([files[path].entry(path) for path in asked if path in files])

    def resolve(self, name, revision, path, kind=None):
        commit = self.find(kind, name).at(revision)
        if not (file := commit.files.get(unquote(path))):
            raise Refusal(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        headers["ETag"] = f'"{file.sha256 if file.lfs else file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-Size": len(file.data), "X-Linked-ETag": headers["ETag"]}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), int(part[2] or len(file.data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
            return self.reply(file.data[first : last + 1], 206, headers)
        self.reply(file.data, 200, headers)

    # --- Writing: how each file goes, the large ones, then one commit that names them ---------------------------------

    def preupload(self, kind, name, revision):
        known, answers = self.find(kind, name).at(revision).files, []
        for file in self.json["files"]:
            large = file["size"] > LFS_BYTES or file["path"].endswith(LFS_SUFFIXES)
            here = known.get(file["path"])
            oid = here and (here.sha256 if here.lfs else here.oid)  # the client skips what has not changed
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "oid": oid, "shouldIgnore": False})
        self.reply({"files": answers})

    def lfs_batch(self, name, kind=None):
        self.find(kind, name)
        objects = [{**file, "authenticated": True} for file in self.json["objects"]]
        for file in objects:
            if file["oid"] not in self.server.blobs:
                href = f"{self.server.url}/lfs/{file['oid']}"
                file["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.reply({"transfer": "basic", "objects": objects, "hash_algo": "sha256"})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "sha256 mismatch")
        self.server.blobs[oid] = self.body
        self.reply()

    def lfs_verify(self, oid):
        self.reply(status=200 if len(self.server.blobs.get(oid, b"")) == self.json["size"] else 404)

    def commit(self, kind, name, revision):
        repo = self.find(kind, name)
        files, title = dict(repo.at(revision).files), ""
        for operation in map(json.loads, filter(None, self.body.split(b"\n"))):
            value = operation["value"]
            match operation["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile" if value["oid"] in self.server.blobs:
                    files[value["path"]] = File(self.server.blobs[value["oid"]], lfs=True)
                case "lfsFile":
                    raise Refusal(400, "", f"LFS object {value['oid']} was not uploaded")
                case "deletedFile":
                    files.pop(value["path"], None)
        oid = repo.commit(unquote(revision), title, files)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self.reply({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API = r"/api/(?P<kind>models|datasets)/" + NAME
FILES = r"/(?P<kind>datasets/)?" + NAME
ROUTES = [  # methods, path, what answers, what the token has to be good for
    (["GET"], r"/api/whoami-v2", Handler.whoami, "read"),
    (["POST"], r"/api/validate-yaml", Handler.validate_yaml, None),
    (["POST"], r"/api/repos/create", Handler.create, "write"),
    (["POST"], API + r"/preupload/" + REVISION, Handler.preupload, "write"),
    (["POST"], FILES + r"\.git/info/lfs/objects/batch", Handler.lfs_batch, "write"),
    (["PUT"], r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put, None),  # the address is the permission, as with S3
    (["POST"], r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify, None),
    (["POST"], API + r"/commit/" + REVISION, Handler.commit, "write"),
    (["POST"], API + r"/branch/(?P<branch>.+)", Handler.branch, "write"),
    (["GET"], API + r"/refs", Handler.refs, None),
    (["GET"], API + r"/tree/" + REVISION + r"(?:/(?P<folder>.+))?", Handler.tree, None),
    (["POST"], API + r"/paths-info/" + REVISION, Handler.paths_info, None),
    (["GET"], API + r"(?:/revision/" + REVISION + ")?", Handler.info, None),
    (["GET", "HEAD"], FILES + r"/resolve/" + REVISION + r"/(?P<path>.+)", Handler.resolve, None),
]
