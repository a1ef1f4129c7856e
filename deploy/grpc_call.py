"""Calls any method of a gRPC server that has reflection: JSON in, JSON out, like curl.

    grpc_call.py HOST:PORT                                     lists services and methods
    grpc_call.py HOST:PORT SERVICE/METHOD '{"text": "Hello"}'   prints each answer as a line of JSON
"""

import sys

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main():
    channel = grpc.insecure_channel(sys.argv[1])
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    if len(sys.argv) == 2:
        for service in database.get_services():
            for method in pool.FindServiceByName(service).methods:
                print(f"{service}/{method.name}")
        return
    service, name = sys.argv[2].split("/")
    method = pool.FindServiceByName(service).FindMethodByName(name)
    text = sys.argv[3] if len(sys.argv) > 3 else "{}"
    request = json_format.Parse(text, message_factory.GetMessageClass(method.input_type)())
    reply = message_factory.GetMessageClass(method.output_type)
    make = channel.unary_stream if method.server_streaming else channel.unary_unary
    call = make(f"/{sys.argv[2]}", request_serializer=lambda m: m.SerializeToString(), response_deserializer=reply.FromString)
    try:
        answer = call(request)
        for message in answer if method.server_streaming else [answer]:
            print(json_format.MessageToJson(message, indent=None, preserving_proto_field_name=True), flush=True)
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")


if __name__ == "__main__":
    main()
