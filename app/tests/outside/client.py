"""Asks a shop over gRPC and prints its answers as one JSON object.

usage: client.py GENERATED ADDRESS QUESTIONS

GENERATED is the folder with the code that protoc made of the protos beside this file. QUESTIONS is a JSON object:
{"tokens": {NAME: TOKEN, ...}, "check": [[PRODUCT, AMOUNT], ...], "get": [PRODUCT, ...], "too_many": COUNT}.
"""

import json
import sys

import grpc
from google.protobuf import descriptor_pb2

GENERATED, ADDRESS, QUESTIONS = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, GENERATED)

import auth_pb2
import auth_pb2_grpc
import health_pb2
import health_pb2_grpc
import product_pb2
import product_pb2_grpc
import reflection_pb2
import reflection_pb2_grpc

# Seconds that a call may take.
PATIENCE = 30
# Seconds after which nobody watches any more.
WATCH = 5


def asked(method, request, show):
    """What a call answers, or the name of the status with which it is refused, and its message."""
    try:
        return show(method(request, timeout=PATIENCE))
    except grpc.RpcError as error:
        return {"refused": error.code().name, "why": error.details()}


def shape(files):
    """Everything in descriptors of files that is seen on the wire, or in a method's path."""
    seen = set()
    for file in files:
        for message in file.message_type:
            for field in message.field:
                label, kind = field.Label.Name(field.label), field.Type.Name(field.type)
                seen.add(f"{file.package}.{message.name}: {label} {kind} {field.type_name} {field.name} = {field.number}")
        for enum in file.enum_type:
            for value in enum.value:
                seen.add(f"{file.package}.{enum.name}: {value.name} = {value.number}")
        for service in file.service:
            for method in service.method:
                seen.add(f"{file.package}.{service.name}: {method.name} {method.input_type} {method.output_type}")
    return seen


def written(module):
    """A proto beside this file, as its descriptor."""
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)
    return file


def reflect(stub, **question):
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=PATIENCE)
    return next(answers)


class OldReflection:
    """The protocol under the name that it had before; its messages are the same."""

    def __init__(self, channel):
        self.ServerReflectionInfo = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )


def served(stub, symbol):
    """The files that the server names for a symbol."""
    answer = reflect(stub, file_containing_symbol=symbol)
    files = answer.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]


def differences(stub, symbol, module):
    """Where the server's own description of a service is not what is written beside this file."""
    return sorted(shape(served(stub, symbol)) ^ shape([written(module)]))


def main():
    # A proxy that the environment names is for other traffic.
    with grpc.insecure_channel(ADDRESS, options=[("grpc.enable_http_proxy", 0)]) as channel:
        auth = auth_pb2_grpc.AuthServiceStub(channel)
        product = product_pb2_grpc.ProductServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)

        def authenticate(token):
            request = auth_pb2.AuthPayload(access_token=token)
            return asked(auth.Auth, request, lambda told: {"customer_id": told.customer_id, "expired": told.expired})

        def check(items):
            items = [product_pb2.CartItem(product_id=id, amount=amount) for id, amount in items]
            show = lambda told: [
                [status.product_id, status.price, product_pb2.Status.Name(status.status)]
                for status in told.product_statuses
            ]
            return asked(product.CheckProducts, product_pb2.CheckProductsRequest(cart_items=items), show)

        def get(ids):
            show = lambda told: [
                {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields} for one in told.products
            ]
            return asked(product.GetProducts, product_pb2.GetProductsRequest(product_ids=ids), show)

        def status(service):
            show = lambda told: health_pb2.HealthCheckResponse.ServingStatus.Name(told.status)
            return asked(health.Check, health_pb2.HealthCheckRequest(service=service), show)

        def watch(service):
            """What is told in a while, and how that ends."""
            told = []
            try:
                for news in health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=WATCH):
                    told.append(health_pb2.HealthCheckResponse.ServingStatus.Name(news.status))
            except grpc.RpcError as error:
                told.append(error.code().name)
            return told

        def listed(stub):
            services = reflect(stub, list_services="*").list_services_response.service
            return sorted(service.name for service in services)

        answers = {
            "auth": {name: authenticate(token) for name, token in QUESTIONS["tokens"].items()},
            "check": check(QUESTIONS["check"]),
            "check_nothing": check([]),
            "get": get(QUESTIONS["get"]),
            "get_nothing": get([]),
            "too_many": get(list(range(1, QUESTIONS["too_many"] + 1))),
            "health": status(""),
            "health_of_a_stranger": status("stranger.Service"),
            "health_watched": watch(""),
            "services": listed(reflection),
            "services_as_of_old": listed(OldReflection(channel)),
            "differences": differences(reflection, "auth.AuthService", auth_pb2)
            + differences(reflection, "product.ProductService", product_pb2),
            "compared": len(shape([written(auth_pb2), written(product_pb2)])),
        }
    json.dump(answers, sys.stdout)


main()
