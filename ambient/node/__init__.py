"""The node: holder, agent, enrolment, CNI."""
