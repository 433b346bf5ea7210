"""What `puyu serve` can be told. Imports neither torch nor a web framework: help pages and parents stay quick."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field

from puyu.configure import Config
from puyu.errors import ConfigError


class ServeConfig(Config):
    """A model behind an OpenAI-compatible HTTP server. Loopback only, unless told otherwise."""

    model: str = "runs/nano/ppo"
    """Model folder, or a hub id owner/name."""
    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs an api_key (or open: true)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    api_key: str = ""
    """Bearer token that requests must carry; better set as the environment variable PUYU_API_KEY."""
    keys_file: str = ""
    """File of hashed API keys with limits, written by `puyu keys`."""
    control_key: str = ""
    """Bearer token of the routes under /control/, which are not there without one; better set as PUYU_CONTROL_KEY."""
    open: bool = False
    """Listen beyond this machine without a key."""
    served_name: str = ""
    """Name of the model in the API; empty takes the folder's name."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters (peft directories) by the names under which requests ask for them."""
    tls_cert: str = ""
    """Certificate file (PEM); with tls_key, the server speaks https."""
    tls_key: str = ""
    """Private key file of the certificate."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may use the server from a browser; none by default."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16."""
    max_running: int = Field(default=128, ge=1)
    """Requests that run at the same time."""
    max_queue: int = Field(default=256, ge=0)
    """Requests that may wait; one more is answered 429 with Retry-After."""
    max_queue_tokens: int = Field(default=262_144, ge=1)
    """Prompt tokens that may wait; more are answered 429."""
    queue_seconds: float = Field(default=0.0, ge=0)
    """Longest time that a request may wait before it begins, then 504; 0 is no limit."""
    answer_seconds: float = Field(default=0.0, ge=0)
    """Longest time of a request in all, then 504; 0 is no limit."""
    slow_seconds: float = Field(default=30.0, gt=0)
    """How long a client may take nothing of its stream before it is cut off."""
    body_seconds: float = Field(default=60.0, gt=0)
    """How long a request may take to arrive."""
    stall_seconds: float = Field(default=300.0, gt=0)
    """How long one step of the engine may take before /health says 503."""
    cache_tokens: int = Field(default=0, ge=0)
    """Tokens that the key/value cache holds; 0 takes what fits."""
    max_pause_ms: float = Field(default=50.0, ge=0)
    """While answers are being written, long prompts are computed in pieces that keep a step within this time; 0 is no
    limit."""
    cache_fraction: float = Field(default=0.3, gt=0, le=0.95)
    """Share of the free memory that the cache may take when cache_tokens is 0; replicas of a machine divide it."""
    cache_dtype: Literal["auto", "int8", "int4"] = "auto"
    """How keys and values are kept: as the model computes them, or as codes."""
    context: int = Field(default=0, ge=0)
    """Tokens that one request may have; 0 is what the model was trained for."""
    call_format: str = "auto"
    """How the model writes tool calls: auto (what its chat template shows), internlm2, hermes, llama3, react, none."""
    deterministic: bool = False
    """Whether an answer depends on nothing but its request; slower."""
    draft_model: str = ""
    """Folder or hub id of a small model that guesses ahead."""
    draft_tokens: int = Field(default=0, ge=0, le=32)
    """Tokens to guess ahead; without a draft model they are looked up in the text itself."""
    max_body_mb: float = Field(default=8.0, gt=0)
    """Largest request body in MB; a larger one is answered 413."""
    log_text: bool = False
    """Whether the log holds what people ask; never without being told."""
    drain_seconds: int = Field(default=30, ge=0)
    """How long requests under way may go on after SIGTERM."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Engine processes behind one address."""
    engine: Literal["local", "ray"] = "local"
    """Where replicas run: local (children of this process) or ray (a Ray cluster, RAY_ADDRESS or a new local one)."""

    @property
    def is_routed(self) -> bool:
        """Whether a router stands before the model."""
        return self.replicas > 1 or self.engine == "ray"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_open(self) -> None:
        """ConfigError for a server that strangers could use by mistake, and for files that are not there."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("tls_cert and tls_key belong together", remedy="give both files, or neither")
        for name in ("tls_cert", "tls_key"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"{name}: there is no file {path}", remedy="give a PEM file")
        if not self.is_local and not self.open and not self._has_key:
            raise ConfigError(
                f"host {self.host} can be reached from other machines, and no api_key is set",
                remedy="set PUYU_API_KEY, --api-key or --keys-file, or say --open true, or keep --host 127.0.0.1",
            )

    @property
    def _has_key(self) -> bool:
        """Whether somebody must know a key; a file of control keys alone leaves the other routes open."""
        from puyu.serve.keys import KeyRing

        return bool(self.api_key) or (bool(self.keys_file) and not KeyRing.of(self.keys_file).is_empty)
