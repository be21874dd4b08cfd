"""Releases on servers: sent, verified there, switched to, and taken back where they do not answer as they should."""

from glmexport.deployment.rollout import Outcome, deploy, prune, roll_back, status
from glmexport.deployment.site import Server, Site, open_site
from glmexport.deployment.unit import service_unit, socket_unit

__all__ = [
    "Outcome",
    "Server",
    "Site",
    "deploy",
    "open_site",
    "prune",
    "roll_back",
    "service_unit",
    "socket_unit",
    "status",
]
