# SPDX-License-Identifier: Apache-2.0
"""The silo as a Flower client: a message with weights comes in, one with noised weights goes out.

What goes out besides the weights is public: the agreed number of records, the steps and epsilon. No loss, no accuracy
on the silo's records, no true number of them. Flower sends the text of an exception to the server, which may quote a
record; so only dpquant's own, which quote none, go out as they are.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from silo import take_round
from study import STUDY, records_of

from dpquant import DPQuantError

HOME = "DPQUANT_SILOS"  # environment variable: folder of the silos' runs

app = ClientApp()


def without_details(handle: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    """Return the handler with exceptions whose text may leave the silo."""

    @functools.wraps(handle)
    def handled(message: Message, context: Context) -> Message:
        failed = ""
        try:
            return handle(message, context)
        except DPQuantError:
            raise
        except Exception as error:
            failed = type(error).__name__
        raise RuntimeError(f"Expected a round of the silo to run; got a {failed}. Its message is withheld.")

    return handled


@app.train()
@without_details
def train(message: Message, context: Context) -> Message:
    """Take a round of this silo, which its node's `partition-id` names."""
    silo, silos = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    home = Path(os.environ.get(HOME, "runs/federated")) / f"silo-{silo}"
    done = take_round(home, records_of(silo, silos), message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"num-examples": STUDY.records, "steps": done.steps, "epsilon": done.epsilon})
    content = RecordDict({"arrays": ArrayRecord(done.weights), "metrics": metrics})
    return Message(content=content, reply_to=message)
