"""Finding what a bank holds of some texts: where they are routed, and what each block does for them.

What is here needs the client alone. `membank.trainer.finding.influence` runs the model and is
imported by itself, so that texts are routed without torch.
"""

from membank.trainer.finding.documents import NamedDocument, read_documents
from membank.trainer.finding.routing import RoutedBlock, RoutingCount, count_routes

__all__ = [
    "NamedDocument",
    "RoutedBlock",
    "RoutingCount",
    "count_routes",
    "read_documents",
]
