"""ConceptCLIP: configuration, network and losses."""

from .configuration_conceptclip import ConceptCLIPConfig
from .modeling_conceptclip import ConceptCLIPModel, ConceptCLIPOutput

__all__ = ["ConceptCLIPConfig", "ConceptCLIPModel", "ConceptCLIPOutput"]
