"""A W&B server of this machine: accepts runs from the real client, and keeps what it is sent."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "k" * 40
ENTITY = "lab"


@dataclass
class Kept:
    """A run at the server.

    Attributes:
        history: rows, in the order of their lines.
        summary, config, project, group, tags: as the client last sent them.
        exit_code: of the last process that finished it.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    project: str = ""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None

    def upsert(self, given: dict[str, Any]) -> None:
        self.project = given["project"] or self.project
        self.group = given["groupName"] or self.group
        self.tags = given["tags"] or self.tags
        self.config |= json.loads(given["config"] or "{}")

    def stream(self, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]]
            if name == "wandb-history.jsonl":
                self.history[part["offset"] : part["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                self.summary = lines[-1]
        self.exit_code = sent.get("exitcode", self.exit_code)


@dataclass
class KeptArtifact:
    """An artifact at the server.

    Attributes:
        kind: its type.
        run: the id of its run.
        files: content by name, of those that were uploaded.
        manifest: names and digests of all its files, as the client last sent it.
        committed: whether the client has said that it is whole.
    """

    kind: str
    run: str
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    committed: bool = False


@dataclass
class Server:
    """What the server keeps, and how it answers.

    Attributes:
        url: where it listens.
        runs: by id.
        status: of every answer; nothing is kept unless it is 200.
        sweeps: configs by id.
        commands: for the agents of sweeps, one each time that they ask.
        artifacts: by name.
    """

    url: str
    runs: dict[str, Kept] = field(default_factory=dict)
    status: int = 200
    sweeps: dict[str, str] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, KeptArtifact] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = getattr(self, name[1] if name else "", lambda _variables: {})
            return {"data": operation(asked.get("variables") or {})}
        if path.endswith("/file_stream"):
            self.runs[path.split("/")[-2]].stream(json.loads(body))
        if path.startswith("/artifacts/"):
            _, _, artifact, *name = path.split("/")
            if name:
                self.artifacts[artifact].files["/".join(name)] = body
            else:
                self.artifacts[artifact].manifest = json.loads(body)
        return {}

    def Viewer(self, _variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": ENTITY, "username": "someone", "email": "", "flags": "{}"}}

    GetDefaultEntity = Viewer

    def UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        inserted = name not in self.runs
        self.runs.setdefault(name, Kept()).upsert(variables)
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}

    def RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        return {"model": {**self._project(""), "bucket": self._bucket(name) if name in self.runs else None}}

    def CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}

    def Runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The public API's list of runs; of its filters only the group."""
        group = json.loads(variables["filters"]).get("group")
        asked = {
            name: run
            for name, run in self.runs.items()
            if run.project == variables["project"] and group in (None, run.group)
        }
        edges = [{"node": {**self._bucket(name), "group": run.group}, "cursor": name} for name, run in asked.items()]
        pages = {"endCursor": None, "hasNextPage": False}
        known = any(run.project == variables["project"] for run in self.runs.values())
        return {"project": {"runCount": len(edges), "runs": {"edges": edges, "pageInfo": pages}} if known else None}

    def ArtifactType(self, _variables: dict[str, Any]) -> dict[str, Any]:
        """Every artifact is the first of its name."""
        return {"project": {"artifact": None}}

    def CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        given = variables["input"]
        name = given["artifactCollectionName"]
        self.artifacts[name] = KeptArtifact(kind=given["artifactTypeName"], run=given["runName"])
        artifact = {"id": name, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": self._manifest(variables["artifactID"])}

    def UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._manifest(variables["artifactManifestID"])}

    def CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/artifacts/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[variables["artifactID"]].committed = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        file = {"id": artifact, "uploadUrl": f"{self.url}/artifacts/{artifact}", "uploadHeaders": []}
        return {"artifactManifest": {"id": artifact, "file": file}}

    def UpsertSweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = variables["config"]
        sweep = {"name": name, "project": self._project(variables["projectName"])}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def SweepWithRuns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = {"name": variables["sweep"], "config": self.sweeps[variables["sweep"]], "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def CreateAgent(self, _variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def Heartbeat(self, _variables: dict[str, Any]) -> dict[str, Any]:
        commands = [self.commands.pop(0)] if self.commands else []
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def RunHistoryKeys(self, variables: dict[str, Any]) -> dict[str, Any]:
        return _of_run({"historyKeys": {"lastStep": len(self.runs[variables["name"]].history) - 1}})

    def RunParquetHistory(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Nothing was exported yet: all rows are live."""
        history = self.runs[variables["runName"]].history
        return _of_run(
            {"parquetHistory": {"parquetUrls": [], "liveData": [{"_step": row["_step"]} for row in history]}}
        )

    def HistoryPage(self, variables: dict[str, Any]) -> dict[str, Any]:
        rows = self.runs[variables["run"]].history
        wanted = [row for row in rows if variables["minStep"] <= row["_step"] < variables["maxStep"]]
        return _of_run({"history": [json.dumps(row) for row in wanted]})

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": self._project(run.project),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsTail": json.dumps(["{}"]),
            "tags": run.tags,
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _project(self, name: str) -> dict[str, Any]:
        return {"id": name, "name": name, "entity": {"id": ENTITY, "name": ENTITY}}


def _of_run(content: dict[str, Any]) -> dict[str, Any]:
    return {"project": {"run": content}}


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port, until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Silent."""

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = json.dumps(server.answer(self.path, body) if server.status == 200 else {}).encode()
            self.send_response(server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = respond

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """The client drops connections as it ends."""

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server = Server(url=f"http://127.0.0.1:{listening.server_port}")
        thread = Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
