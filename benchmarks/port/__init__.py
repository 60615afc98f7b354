"""What `port` can do, measured: models of many libraries and manners, and a table of what comes out."""
