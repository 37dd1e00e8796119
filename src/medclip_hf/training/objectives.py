"""What a model is trained for: run it, gather across processes, call its losses, return named scalars.

An objective has three methods, and the loop knows nothing else about the model:

    split(batch, num_chunks)    micro-batches of a batch
    embed(model, batch)         one forward pass; its entries can be concatenated over micro-batches along axis 0
    compare(embeddings, batch)  the losses of the whole batch against those of the other processes

so that `compare(embed(model, batch), batch)["loss"].backward()` is a step, and embedding micro-batch by micro-batch
before one `compare` gives the same gradients, which adding up the losses of micro-batches would not.

`compare(...)["loss"]` is this process's share of the global loss times the number of processes: the mean over processes
of its gradients, which is what DistributedDataParallel applies, is the gradient of one process with the global batch.
"""

from medclip_hf.training.objective_conceptclip import ConceptCLIPObjective
from medclip_hf.training.objective_fvlm import FVLMObjective

__all__ = ["ConceptCLIPObjective", "FVLMObjective"]
