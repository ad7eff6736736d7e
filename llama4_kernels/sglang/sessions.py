"""Turns of sessions that end SGLang 0.5.23: it clears what it iterates over, and computes with images that it has released or cut off."""

from __future__ import annotations

import numpy as np


def forget_replaced_requests(session, turn) -> None:
    """Clear what a turn replaces: SGLang clears what it iterates over, by rids that later turns may have taken over, and each turn within the
    one before, all of which ends the server."""
    if not turn.replace or session.streaming:
        return
    nodes = session.req_nodes
    if turn.rid is None:
        replaced = list(nodes.values())
    elif turn.rid in nodes:
        replaced, nodes[turn.rid].children = nodes[turn.rid].children, []
        for node in replaced:  # which grows meanwhile
            replaced += node.children
    else:
        return
    for node in replaced:
        node.abort()
        if nodes.get(node.req.rid) is node:
            del nodes[node.req.rid]


def refuse_lost_images(session, request, new_tokens: int, vocab_size: int) -> None:
    """Abort a request that continues another without all of an image: of which an offset leaves a part, or which was released with a request
    that was aborted. What stands for it among the tokens has no embedding.

    request: SGLang's Req, just made, whose last `new_tokens` tokens are its own.
    """
    inherited = np.asarray(request.origin_input_ids)[: len(request.origin_input_ids) - new_tokens]
    if request.multimodal_inputs is None:
        lost = inherited.size > 0 and int(inherited.max()) >= vocab_size
        message = "session_params continues a request whose images were released when it was aborted, needs another rid"
    else:
        ends = [end for item in request.multimodal_inputs.mm_items for _, end in item.offsets or ()]
        lost = max(ends, default=-1) >= inherited.size
        message = f"session_params.offset leaves {inherited.size} tokens, needs an offset behind all images, which end at token {max(ends, default=0)}"
    if lost:
        request.set_finish_with_abort(message)
        node = session.req_nodes.pop(request.rid)
        if node.parent is not None:
            node.parent.children.remove(node)


def let_requests_end(session) -> None:
    """Before a session is closed, leave to its requests the images of which they still need: SGLang releases them all."""
    if not session.streaming and any(not node.req.finished() for node in session.req_nodes.values()):
        session.req_nodes.clear()
