"""The process clients talk to: it picks nodes, owns transfers, joins the two legs of a request and streams."""
