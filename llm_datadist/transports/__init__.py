"""How bytes move on a link: one interface, one module for each way, chosen when the link is made."""
