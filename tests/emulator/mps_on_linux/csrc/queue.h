// The command queue: what is encoded runs, in order, when somebody synchronises.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>

namespace emulator {

// A command's failure. The text is made when no lock is held: it may need Python.
struct CommandError {
  std::function<std::string()> text;
};

class Queue {
 public:
  using Command = std::function<void()>;  // owns the memory that it uses

  void push(Command command);
  void submit();       // a commit: nothing changes for the caller
  void drain();        // run all that is queued; throws the first failure and drops what comes after it
  void synchronise();  // drain, counted: on a Mac the host would wait here

  // Drains if max_pending commands wait, as a real queue starts work long before anybody waits for it. Every push asks
  // for that, and the end of a command block for what was pushed inside.
  void run_ahead();
  static constexpr size_t max_pending = 1024;

 private:
  size_t pending();
  bool take_pending(std::deque<Command>& commands);

  std::mutex pending_mutex_, running_mutex_;
  std::deque<Command> pending_;
};

Queue& queue();

// True in the thread that runs a command block: it may encode, and neither synchronise nor queue anything else.
bool in_command_block();

}  // namespace emulator
