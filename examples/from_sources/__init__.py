"""Programs for the documents that silbo is based on. Each is small, and its first lines say how to run it.

| program | what the document shows |
|---|---|
| `harp` | Whistle in the HARP proxy: names, envelopes, constants, listeners, services and a container-wide dispatcher |
| `diator_redis` | Diator: commands, queries, three kinds of events, rodi, middlewares, Redis Pub/Sub |
| `diator_azure` | the same application on Azure Service Bus |
| `cqrs_joins` | python-cqrs: bootstrap with mappers, and four events handled |
| `cqrs_flow` | its event flow: one by one or side by side, follow-ups, events nobody handles |
| `cqrs_kafka`, `cqrs_rabbitmq` | its notification events, on Kafka and on RabbitMQ, and heard again |
"""
