#include "queue.h"

#include <c10/util/Exception.h>

#include <optional>
#include <utility>

#include "counters.h"
#include "plain_dispatch.h"

namespace emulator {

Queue& queue() {
  static auto* instance = new Queue;
  return *instance;
}

void Queue::push(Command command) {
  {
    const std::lock_guard lock(pending_mutex_);
    pending_.push_back(std::move(command));
  }
  if (!in_command_block()) run_ahead();
}

void Queue::run_ahead() {
  if (pending() >= max_pending) drain();
}

void Queue::submit() {
  if (pending()) count(Event::commit);
}

size_t Queue::pending() {
  const std::lock_guard lock(pending_mutex_);
  return pending_.size();
}

bool Queue::take_pending(std::deque<Command>& commands) {
  const std::lock_guard lock(pending_mutex_);
  std::swap(commands, pending_);
  return !commands.empty();
}

void Queue::drain() {
  TORCH_CHECK(!in_command_block(), "mps emulator: waiting for the device inside a command block never ends");
  std::optional<CommandError> error;
  {
    const std::lock_guard lock(running_mutex_);
    const PlainDispatch plain;  // whatever surrounds the wait, or surrounded the call
    std::deque<Command> commands;
    while (!error && take_pending(commands)) {
      count(Event::commit);
      try {
        for (; !commands.empty(); commands.pop_front()) commands.front()();
      } catch (CommandError& failure) {
        error = std::move(failure);
      } catch (const c10::Error& failure) {
        error = CommandError{[text = std::string(failure.what_without_backtrace())] { return text; }};
      } catch (const std::exception& failure) {
        error = CommandError{[text = std::string(failure.what())] { return text; }};
      }
    }
  }
  if (error) TORCH_CHECK(false, "mps device: ", error->text());
}

void Queue::synchronise() {
  TORCH_CHECK(!in_command_block(), "mps emulator: waiting for the device inside a command block never ends");
  count(Event::synchronisation);
  drain();
}

}  // namespace emulator
