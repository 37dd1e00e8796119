"""ConceptCLIP: configuration, network and losses."""

from medclip_hf.modeling.conceptclip.configuration_conceptclip import ConceptCLIPConfig
from medclip_hf.modeling.conceptclip.modeling_conceptclip import ConceptCLIPModel, ConceptCLIPOutput

__all__ = ["ConceptCLIPConfig", "ConceptCLIPModel", "ConceptCLIPOutput"]
